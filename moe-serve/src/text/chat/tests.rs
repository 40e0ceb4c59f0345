//! Templates, rendered.

use super::*;
use serde_json::json;

fn messages(list: &[(&str, &str)]) -> Vec<ChatMessage> {
    list.iter().map(|(role, content)| ChatMessage::new(*role, *content)).collect()
}

fn template(source: &str) -> ChatTemplate {
    let config =
        json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": true, "chat_template": source});
    ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).expect("compiles")
}

fn weather() -> Tool {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}});
    Tool {
        name: "weather".into(),
        parameters: parameters.as_object().expect("an object").clone(),
        definition: json!({"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": parameters}}),
    }
}

fn called() -> ChatMessage {
    let arguments = json!({"city": "Paris", "days": 2}).as_object().expect("an object").clone();
    let call = ToolCall { id: "call_1".into(), name: "weather".into(), arguments };
    ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() }
}

#[test]
fn dialogue_format() {
    let list = messages(&[("system", "A talk."), ("user", "Hi.\nYou?"), ("assistant", "Fine."), ("user", "Good.")]);
    let text = ChatTemplate::dialogue().and_then(|t| t.render(&list)).expect("renders");
    assert_eq!(text, "A talk.\n\nA: Hi.\nYou?\nB: Fine.\nA: Good.\nB:");
}

#[test]
fn dialogue_with_tools() {
    let answer = ChatMessage { tool_call_id: Some("call_1".into()), ..ChatMessage::new("tool", "{\"sun\": true}") };
    let list = [ChatMessage::new("user", "Paris?"), called(), answer];
    let dialogue = ChatTemplate::dialogue().expect("compiles");
    assert!(dialogue.has_tools());
    let text = dialogue.render_with(&list, &[weather()], &Map::new()).expect("renders");
    let want = "@weather {city, days} Of a city.\n\nA: Paris?\nB: @weather {\"city\": \"Paris\", \"days\": 2}\n@ {\"sun\": true}\nB:";
    assert_eq!(text, want);
}

#[test]
fn developers_are_the_system_where_a_template_knows_none() {
    let list = messages(&[("developer", "Be brief."), ("user", "Hi.")]);
    let named = |role: &str| format!("{{% if m.role == '{role}' %}}{role} {{{{ m.content }}}} {{% endif %}}");
    let of = |roles: &[&str]| {
        let all: String = roles.iter().map(|role| named(role)).collect();
        template(&format!("{{% for m in messages %}}{all}{{% endfor %}}")).render(&list).expect("renders")
    };
    assert_eq!(of(&["system", "user"]), "system Be brief. user Hi. ");
    assert_eq!(of(&["system", "user", "developer"]), "developer Be brief. user Hi. ");
}

#[test]
fn message_text_is_not_template_text() {
    let text = ChatTemplate::dialogue().and_then(|t| t.render(&messages(&[("user", "{{ 1 + 1 }} <b>&")])));
    assert_eq!(text.expect("renders"), "A: {{ 1 + 1 }} <b>&\nB:");
}

#[test]
fn a_models_own_template() {
    let source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}\n{% endfor %}{{ add_bos_token }}";
    let template = template(source);
    assert_eq!(template.render(&messages(&[("user", " x ")])).expect("renders"), "<s>[user] x\n");
    assert!(template.stop_strings().is_empty() && !template.has_tools() && template.tool_format().is_none());
}

#[test]
fn a_file_of_its_own_goes_before_the_tokenizers() {
    let config = br#"{"bos_token": "<s>", "chat_template": "old"}"#;
    let template = ChatTemplate::from_files(Some(config), Some(b"{{ bos_token }}new")).expect("compiles");
    assert_eq!(template.render(&[]).expect("renders"), "<s>new");
    let alone = ChatTemplate::from_files(None, Some(b"new")).expect("compiles");
    assert_eq!(alone.render(&[]).expect("renders"), "new");
    assert!(
        ChatTemplate::from_files(None, Some(b"\xff")).expect_err("refused").to_string().contains("chat_template.jinja")
    );
}

#[test]
fn the_template_for_tools_is_taken_where_there_are_some() {
    let config = json!({"chat_template": [{"name": "tool_use", "template": "{{ tools | length }} tools"}, {"name": "default", "template": "none"}]});
    let template = ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).expect("compiles");
    assert_eq!(template.render(&[]).expect("renders"), "none");
    assert_eq!(template.render_with(&[], &[weather()], &Map::new()).expect("renders"), "1 tools");
    assert!(template.has_tools());
}

#[test]
fn a_template_may_refuse() {
    let error = template("{{ raise_exception('only one message') }}").render(&[]).expect_err("refuses").to_string();
    assert!(error.contains("only one message"), "{error}");
}

#[test]
fn arguments_are_text_where_the_template_wants_text() {
    let source = "{% for m in messages %}{% for c in m.tool_calls %}{{ 'json ' + c.function.arguments }}{% endfor %}{% endfor %}";
    assert_eq!(template(source).render(&[called()]).expect("renders"), "json {\"city\": \"Paris\", \"days\": 2}");
}

#[test]
fn variables_of_a_template() {
    let variables = json!({"enable_thinking": false}).as_object().expect("an object").clone();
    let template = template("{{ 'no' if enable_thinking is defined and not enable_thinking else 'yes' }}");
    assert_eq!(template.render_with(&[], &[], &variables).expect("renders"), "no");
    assert_eq!(template.render(&[]).expect("renders"), "yes");
}

#[test]
fn blocks_for_training_and_dates() {
    let text =
        template("a\n{%- generation -%}\n b {%- endgeneration %}{% generation %}\nc{% endgeneration %}").render(&[]);
    assert_eq!(text.expect("renders"), "abc");
    let year = template("{{ strftime_now('%Y') }}").render(&[]).expect("renders");
    assert!(year.parse::<u32>().is_ok_and(|year| year >= 2025), "{year}");
    assert!(template("{{ strftime_now('%Q') }}").render(&[]).is_err());
}

#[test]
fn a_template_without_an_end_is_an_error() {
    let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a * b %}{% endfor %}{% endfor %}";
    let error = template(source).render(&[]).expect_err("ends").to_string();
    assert!(error.contains("fuel"), "{error}");
}

#[test]
fn bad_templates_are_errors() {
    for config in [
        "{",
        r#"{"chat_template": "{% for %}"}"#,
        r#"{"chat_template": [1]}"#,
        r#"{"chat_template": 3}"#,
        r#"{"chat_template": "{%}"}"#,
    ] {
        assert!(ChatTemplate::from_files(Some(config.as_bytes()), None).is_err(), "{config}");
    }
}

#[test]
fn thoughts_have_the_name_that_a_template_asks_for() {
    let print = "{{ message.content }}|{{ message.thinking }}|{{ message.reasoning_content }};";
    let all = format!("{{% for message in messages %}}{print}{{% endfor %}}");
    let thought = |message| ChatMessage { reasoning: Some("Hm.".into()), ..message };
    let list = [
        thought(ChatMessage::new("assistant", "Yes.")),
        thought(called()),
        thought(ChatMessage { content: Some("I look.".into()), ..called() }),
    ];
    let render = |source: &str, list: &[ChatMessage]| template(source).render(list).expect("renders");
    assert_eq!(render(&all, &list), "Yes.|Hm.|Hm.;|Hm.|Hm.;I look.|Hm.|Hm.;");
    // gpt-oss' takes one text before calls: nothing is lost.
    let harmony = format!("{{# <|channel|> <|message|> #}}{all}");
    assert_eq!(render(&harmony, &list), "Yes.|Hm.|Hm.;|Hm.|Hm.;|Hm.\nI look.|Hm.;");
    let silent = [ChatMessage { reasoning: Some(String::new()), content: Some("I look.".into()), ..called() }];
    assert_eq!(render(&harmony, &silent), "I look.||;");
    let other = "{% for message in messages %}{{ message }}{% endfor %}";
    assert!(!render(other, &list).contains("thinking"));
}
