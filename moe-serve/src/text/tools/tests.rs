//! Answers of each family, read whole, byte by byte, and made by a grammar.

use super::*;
use crate::engine::GrammarState;
use crate::text::Grammars;
use crate::text::testing::tokenizer;
use serde_json::{Value, json};

fn tool(name: &str, parameters: Value) -> Tool {
    let definition = json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    Tool { name: name.into(), parameters: parameters.as_object().expect("an object").clone(), definition }
}

fn tools() -> Vec<Tool> {
    let city = json!({"city": {"type": "string"}, "days": {"type": "integer"}});
    vec![
        tool(
            "weather",
            json!({"type": "object", "properties": city, "required": ["city"], "additionalProperties": false}),
        ),
        tool("now", json!({"type": "object", "properties": {}, "additionalProperties": false})),
    ]
}

/// What an answer says: `text`, `(thought)`, and calls as `name{...}`.
fn told(parts: &[AnswerPart]) -> String {
    let mut told = String::new();
    let mut in_reasoning = false;
    for part in parts {
        if in_reasoning != matches!(part, AnswerPart::Reasoning(_)) {
            told.push(if in_reasoning { ')' } else { '(' });
            in_reasoning = !in_reasoning;
        }
        match part {
            AnswerPart::Text(text) | AnswerPart::Reasoning(text) | AnswerPart::Arguments(text) => told.push_str(text),
            AnswerPart::Call(name) => told.push_str(&format!("|{name}")),
        }
    }
    told
}

/// The answer is the same however it is cut.
#[track_caller]
fn check(name: &str, answer: &str, want: &str) {
    let format = ToolFormat::named(name).expect("a name");
    let read = |size: usize| {
        let mut parser = format.parser(&tools());
        let mut parts = Vec::new();
        let chars: Vec<char> = answer.chars().collect();
        for piece in chars.chunks(size) {
            parts.extend(parser.push(&piece.iter().collect::<String>()));
        }
        parts.extend(parser.finish());
        told(&parts)
    };
    for size in [usize::MAX, 1, 2, 3, 7] {
        assert_eq!(read(size), want, "{name} in pieces of {size}: {answer}");
    }
}

#[test]
fn hermes() {
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"a}\\\"b\"}}\n</tool_call>";
    check("hermes", call, "|weather{\"city\": \"a}\\\"b\"}");
    check(
        "hermes",
        &format!("Let me see.\n{call}\n{call}"),
        "Let me see.|weather{\"city\": \"a}\\\"b\"}|weather{\"city\": \"a}\\\"b\"}",
    );
    check("hermes", &format!("{call}\n\nDone."), "|weather{\"city\": \"a}\\\"b\"}Done.");
    check(
        "hermes",
        "<tool_call>{\"arguments\": {\"x\": [1, 2]}, \"name\": \"now\"}</tool_call>",
        "|now{\"x\": [1, 2]}",
    );
    check("hermes", "<tool_call>{\"name\": \"now\"}</tool_call>", "|now{}");
    check("hermes", "<tool_call>{\"name\": \"now\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>", "|now{\"a\": 1}");
    check("hermes", "no call, a < b <tool", "no call, a < b <tool");
    check("hermes", "ends with space \n", "ends with space \n");
    check("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>");
    check("hermes", "<tool_call>{\"x\": 1}", "<tool_call>{\"x\": 1}");
    check("hermes", "<tool_call>{\"name\": \"weather\", \"arguments\": {\"ci", "|weather{\"ci");
    check("hermes", "<tool_call>", "<tool_call>");
    check("hermes", "{\"name\": \"now\"}", "{\"name\": \"now\"}");
}

#[test]
fn mistral() {
    check(
        "mistral",
        "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"weather\", \"arguments\": {\"city\": \"x\"}}]",
        "|now{}|weather{\"city\": \"x\"}",
    );
    check("mistral", "[TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}, \"id\": \"abcdefghi\"}]", "|now{}");
    check(
        "mistral",
        "[TOOL_CALLS]weather[ARGS]{\"city\": \"x\"}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}",
        "|weather{\"city\": \"x\"}|now{}",
    );
    check("mistral", "a [list] of {things}", "a [list] of {things}");
}

#[test]
fn granite() {
    check("granite", "<|tool_call|>[{\"name\": \"now\", \"arguments\": {}}]", "|now{}");
    check("granite", "hello", "hello");
}

#[test]
fn llama() {
    check("llama3_json", "{\"name\": \"weather\", \"parameters\": {\"city\": \"x\"}}", "|weather{\"city\": \"x\"}");
    check(
        "llama3_json",
        " {\"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {}}",
        "|now{}|now{}",
    );
    check("llama3_json", "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}", "|now{}");
    check("llama4_json", "<|python_start|>{\"name\": \"now\", \"parameters\": {}}<|python_end|>", "|now{}");
    check(
        "llama3_json",
        "{\"name\": \"Paris\", \"country\": \"France\"}",
        "{\"name\": \"Paris\", \"country\": \"France\"}",
    );
    check(
        "llama3_json",
        "Here: {\"name\": \"now\", \"parameters\": {}}",
        "Here: {\"name\": \"now\", \"parameters\": {}}",
    );
}

#[test]
fn deepseek() {
    let v3 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"x\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check("deepseek_v3", v3, "|weather{\"city\": \"x\"}|now{}");
    let v31 = "So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"x\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check("deepseek_v31", v31, "So.|weather{\"city\": \"x\"}");
    check("deepseek_v3", "a < b <｜to", "a < b <｜to");
    check("deepseek_v3", "<｜tool▁call▁begin｜>function", "<｜tool▁call▁begin｜>function");
    // What stands where calls should is text; what ends a call is not.
    check("deepseek_v3", "<｜tool▁calls▁begin｜>I cannot.", "I cannot.");
    let slip = "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check("deepseek_v31", slip, "|now{}");
    check("deepseek_v31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls", "|now{}");
    check("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n``", "|now{}");
    check("deepseek_v3", "<｜tool▁calls▁begin｜>```\ncode\n```", "```\ncode\n```");
    check("deepseek_v31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "|now{}");
    check("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call", "|now{}");
    check(
        "deepseek_v31",
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜> That is all.",
        "|now{}That is all.",
    );
}

#[test]
fn glm() {
    let call = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>";
    check("glm45", &format!("Yes.\n{call}"), "Yes.|weather{\"city\": \"12\", \"days\": 3}");
    check("glm45", "<tool_call>now\n</tool_call>\n<tool_call>now</tool_call>", "|now{}|now{}");
    check(
        "glm45",
        "<tool_call>weather<arg_key>other</arg_key><arg_value>a b</arg_value></tool_call>",
        "|weather{\"other\": \"a b\"}",
    );
    check("glm45", "<tool_call></tool_call>", "<tool_call></tool_call>");
    check("glm45", "<tool_call></tool_call><tool_call>now\n</tool_call>", "<tool_call></tool_call>|now{}");
    check("glm45", "plain", "plain");
}

#[test]
fn harmony() {
    let thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant";
    check("openai", &format!("{thought}<|channel|>final<|message|>Hello."), "(Hm.)Hello.");
    check(
        "openai",
        &format!(
            "{thought}<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{{\"city\": \"x\"}}<|call|>"
        ),
        "(Hm.)|weather{\"city\": \"x\"}",
    );
    check("openai", &format!("{thought} to=functions.now<|channel|>commentary json<|message|>{{}}"), "(Hm.)|now{}");
    check(
        "openai",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.now<|channel|>commentary<|message|>{}",
        "I look.|now{}",
    );
    check("openai", "{\"a\": 1}", "{\"a\": 1}");
    check("openai", "<|channel|>fin", "");
}

#[test]
fn dialogue() {
    check("dialogue", "@weather {\"city\": \"x\"}", "|weather{\"city\": \"x\"}");
    check("dialogue", " @now {}\n@now {\"a\": \"}\"}\nwell", "|now{}|now{\"a\": \"}\"}well");
    check("dialogue", "I ask.\n@now {}", "I ask.|now{}");
    check("dialogue", "@john {hi} @now {}\n@no", "@john {hi} @now {}\n@no");
}

#[test]
fn templates_are_known_by_their_marks() {
    for (template, name) in [
        ("<tool_call>{{ x }}</tool_call>", "hermes"),
        ("<tool_call><arg_key>", "glm45"),
        ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<|tool_call|>", "granite"),
        ("<|start_header_id|> {\"name\": 1, \"parameters\": 2}", "llama3_json"),
        ("<|start|>assistant<|channel|>final<|message|>", "openai"),
    ] {
        assert_eq!(ToolFormat::of_template(template).map(ToolFormat::name), Some(name), "{template}");
    }
    assert_eq!(ToolFormat::of_template("<|im_start|>"), None);
    assert!(ToolFormat::all_names().iter().all(|name| ToolFormat::named(name).is_some()));
    assert_eq!(ToolFormat::named("none"), None);
    let ids: Vec<String> =
        ["mistral", "hermes"].iter().map(|n| ToolFormat::named(n).expect("a name").call_id(1 << 40)).collect();
    assert_eq!(ids, ["000000000", "call_0000010000000000"]);
}

/// How many of the answer's tokens the grammar takes, of how many, and whether the answer may end there.
fn walk(format: ToolFormat, parallel: bool, special: &[&str], answer: &str) -> (usize, usize, bool) {
    walk_of(special, answer, |tokenizer| format.grammar(&tools(), parallel, tokenizer))
}

/// The same for an answer that need not call.
fn walk_free(format: ToolFormat, special: &[&str], answer: &str) -> (usize, usize, bool) {
    walk_of(special, answer, |tokenizer| format.free_grammar(&tools(), true, tokenizer))
}

fn walk_of(
    special: &[&str],
    answer: &str,
    source: impl FnOnce(&TextTokenizer) -> GrammarSource,
) -> (usize, usize, bool) {
    let tokenizer = tokenizer(special);
    let grammars = Grammars::new(&tokenizer, &[0]).expect("works");
    let source = source(&tokenizer);
    let mut state = grammars.compile(&source).unwrap_or_else(|e| panic!("{e}: {source:?}")).start();
    let allows =
        |state: &dyn GrammarState, id: u32| state.allowed().expect("goes on")[id as usize / 32] >> (id % 32) & 1 == 1;
    let ids = tokenizer.encode(answer).expect("encodes");
    let mut taken = 0;
    for &id in &ids {
        if !allows(state.as_ref(), id) {
            break;
        }
        state.push(id).expect("allowed");
        taken += 1;
    }
    (taken, ids.len(), allows(state.as_ref(), 0))
}

/// Calls as the grammars have them, with `ARGS` for their arguments.
const CALLS: [(&str, &str); 9] = [
    ("hermes", "<tool_call>\n{\"name\": \"weather\", \"arguments\": ARGS}\n</tool_call>"),
    ("mistral", "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": ARGS}]"),
    ("granite", "<|tool_call|>[{\"name\": \"weather\", \"arguments\": ARGS}]"),
    ("llama3_json", "{\"name\": \"weather\", \"parameters\": ARGS}"),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\nARGS\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>ARGS<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    ("openai", "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>ARGS"),
    ("dialogue", " @weather ARGS"),
    (
        "glm45",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    ),
];

#[test]
fn grammars_say_what_parsers_read() {
    let arguments = "{\"city\": \"x\", \"days\": 3}";
    for (name, answer) in CALLS {
        let format = ToolFormat::named(name).expect("a name");
        let answer = answer.replace("ARGS", arguments);
        // With the family's marks as special tokens, and with none.
        for special in [format.0.form().markers, &[]] {
            let (taken, of, ends) = walk(format, false, special, &answer);
            assert!(taken == of && ends, "{name}: {taken} of {of}, {special:?}");
        }
        check(name, &answer, &format!("|weather{arguments}"));
        let (taken, of, _) = walk(format, false, &[], &answer.replace("weather", "wether"));
        assert!(taken < of, "{name} has no such tool");
        let (taken, of, _) = walk(format, false, &[], &answer.replace("3", "x"));
        assert!(taken < of, "{name}: not the schema's");
    }
}

#[test]
fn several_calls_where_they_are_allowed() {
    let hermes = ToolFormat::named("hermes").expect("a name");
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let twice = format!("{call}\n{call}");
    let (taken, of, ends) = walk(hermes, true, &[], &twice);
    assert!(taken == of && ends);
    let (taken, of, _) = walk(hermes, false, &[], &twice);
    assert!(taken < of);
}

/// What may be said before a call of each family.
fn before(name: &str) -> &'static str {
    match name {
        "openai" => "<|channel|>analysis<|message|>I <look> {at} it.<|end|><|start|>assistant",
        // A call is the whole answer.
        "llama3_json" => "",
        "dialogue" => "I @look\n@weath\n@weather, you {say}.\n",
        _ => "I <look> {at} \n[it].",
    }
}

#[test]
fn free_answers_are_held_where_they_call() {
    for (name, call) in CALLS {
        let format = ToolFormat::named(name).expect("a name");
        let markers = format.0.form().markers;
        for special in [markers, &[]] {
            let call = before(name).to_owned() + call;
            let good = call.replace("ARGS", "{\"city\": \"x\", \"days\": 3}");
            let (taken, of, ends) = walk_free(format, special, &good);
            assert!(taken == of && ends, "{name}: {taken} of {of}, {special:?}: {good}");
            let bad = good.replace('3', "x");
            let (taken, of, _) = walk_free(format, special, &bad);
            assert!(taken < of, "{name}, {special:?}: not the schema's");
            let unknown = good.replace("weather", "wether");
            let (taken, of, _) = walk_free(format, special, &unknown);
            // In the dialogue form a line of another name is a line of text.
            assert!(taken < of || name == "dialogue", "{name}, {special:?} has no such tool");
            let text = match name {
                "openai" => format!("{}<|channel|>final<|message|>A < b {{c}}.", before(name)),
                "llama3_json" => "A {b} <c> [d]".to_owned(),
                _ => format!("{}\n\u{e9} <tool {{", before(name)),
            };
            let (taken, of, ends) = walk_free(format, special, &text);
            assert!(taken == of && ends, "{name}: {taken} of {of}, {special:?}: {text}");
        }
    }
}

#[test]
fn an_answer_is_calls_or_of_a_form() {
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": false});
    let forms = [
        (GrammarSource::JsonSchema(schema), "{\"name\": \"<tool_call>weather\"}", "{\"name\": 3}"),
        (GrammarSource::JsonObject, "{\"a\": [1]}", "[1]"),
        (GrammarSource::Regex("[0-9/]+".into()), "12/3", "12a"),
        (GrammarSource::Choice(vec!["yes".into(), "no".into()]), "yes", "maybe"),
        (GrammarSource::Lark("start: \"(\" start \")\" | \"x\"".into()), "((x))", "((x)}"),
    ];
    for (name, call) in CALLS {
        let format = ToolFormat::named(name).expect("a name");
        let call = call.replace("ARGS", "{\"city\": \"x\", \"days\": 3}");
        if name == "llama3_json" {
            assert!(format.grammar_or_form(&tools(), true, GrammarSource::JsonObject, &tokenizer(&[])).is_none());
            continue;
        }
        for (form, good, bad) in &forms {
            for special in [format.0.form().markers, &[]] {
                let walk = |answer: &str| {
                    walk_of(special, answer, |tokenizer| {
                        format.grammar_or_form(&tools(), true, form.clone(), tokenizer).expect("they can be told apart")
                    })
                };
                // A mark that is a token of its own is never part of a text.
                let plain = if special.is_empty() { (*good).to_owned() } else { good.replace("<tool_call>", "") };
                for answer in [call.as_str(), &plain] {
                    let (taken, of, ends) = walk(answer);
                    assert!(taken == of && ends, "{name}: {taken} of {of}, {special:?}, {form:?}: {answer}");
                }
                for answer in [*bad, format!("Well, {call}").as_str()] {
                    let (taken, of, ends) = walk(answer);
                    assert!(taken < of || !ends, "{name}, {special:?}, {form:?}: {answer}");
                }
            }
            for (answer, want) in
                [(good, (*good).to_owned()), (&call.as_str(), "|weather{\"city\": \"x\", \"days\": 3}".into())]
            {
                for size in [usize::MAX, 1, 3] {
                    let mut parser = format.parser_or_form(&tools());
                    let chars: Vec<char> = answer.chars().collect();
                    let mut parts: Vec<AnswerPart> =
                        chars.chunks(size).flat_map(|piece| parser.push(&piece.iter().collect::<String>())).collect();
                    parts.extend(parser.finish());
                    assert_eq!(told(&parts), want, "{name} in pieces of {size}: {answer}");
                }
            }
        }
    }
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_the_same_however_it_is_cut(text in "[@{}\\[\\]\"<>|:,; \nawe/]{0,40}|(<tool_call>|</tool_call>|\\{\"name\": \"now\"|, \"arguments\": |\\{\\}|<arg_key>|</arg_key>|\\[TOOL_CALLS\\]|<\\|message\\|>|<\\|channel\\|>|@now \\{|a|\n| ){0,9}") {
        for name in ToolFormat::all_names() {
            let format = ToolFormat::named(name).expect("a name");
            for or_form in [false, true] {
                let read = |pieces: Vec<String>| {
                    let mut parser = if or_form { format.parser_or_form(&tools()) } else { format.parser(&tools()) };
                    let mut parts: Vec<AnswerPart> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
                    parts.extend(parser.finish());
                    told(&parts)
                };
                let whole = read(vec![text.clone()]);
                assert_eq!(read(text.chars().map(String::from).collect()), whole, "{name}, {or_form}: {text:?}");
            }
        }
    }
}
