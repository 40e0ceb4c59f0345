//! Tools in `/v1/chat/completions`: calls that a model makes by itself, and calls it is held to.

use crate::gpt::server;
use crate::support::{ScriptedLm, TestServer, served};
use moe_serve::api::Limits;
use moe_serve::text::ChatTemplate;
use serde_json::{Value, json};
use std::sync::Arc;

const PATH: &str = "/v1/chat/completions";

fn tools() -> Value {
    json!([
        {"type": "function", "function": {
            "name": "mat",
            "description": "Who sat on it.",
            "parameters": {"type": "object", "properties": {"who": {"enum": ["cat", "dog"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["who", "n"], "additionalProperties": false},
        }},
        {"type": "function", "function": {"name": "now"}},
    ])
}

/// The prompt of one message with these tools, and the answer after it.
fn scripted(answer: &str) -> TestServer {
    TestServer::scripted(&format!("@mat {{who, n}} Who sat on it.\n@now {{}}\n\nA: who?\nB:{answer}\nA: the cat"))
}

fn ask(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "who?"}], "tools": tools(), "temperature": 0});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}

/// What a client makes of a stream: text, calls, and why it ended.
fn assembled(events: &[Value]) -> (String, Vec<Value>, Value) {
    let (mut text, mut calls, mut finish) = (String::new(), Vec::<Value>::new(), Value::Null);
    for choice in events.iter().map(|event| &event["choices"][0]) {
        let delta = &choice["delta"];
        text.push_str(delta["content"].as_str().unwrap_or_default());
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().expect("an index") as usize;
            if index == calls.len() {
                assert_eq!(
                    (&call["type"], &call["function"]["arguments"]),
                    (&json!("function"), &json!("")),
                    "the name comes first"
                );
                calls.push(json!({"id": call["id"], "type": "function", "function": {"name": call["function"]["name"], "arguments": ""}}));
            } else {
                assert!(call.get("id").is_none() && call["function"].get("name").is_none(), "said once: {call}");
                let so_far = calls[index]["function"]["arguments"].as_str().expect("text").to_owned();
                let more = call["function"]["arguments"].as_str().expect("more");
                calls[index]["function"]["arguments"] = (so_far + more).into();
            }
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    (text, calls, finish)
}

#[test]
fn calls_by_choice_whole_and_streamed() {
    let server = scripted(" I look.\n@mat {\"who\": \"cat\", \"n\": 1}\n@now {}");
    let answer = server.client.post(PATH, &ask(json!({}))).ok();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("I look."), &json!("tool_calls")));
    let calls = choice["message"]["tool_calls"].as_array().expect("calls");
    let told: Vec<_> = calls.iter().map(|call| (&call["type"], &call["function"])).collect();
    let kind = json!("function");
    let [first, second] = [
        json!({"name": "mat", "arguments": "{\"who\": \"cat\", \"n\": 1}"}),
        json!({"name": "now", "arguments": "{}"}),
    ];
    assert_eq!(told, [(&kind, &first), (&kind, &second)]);
    assert!(calls[0]["id"].as_str().is_some_and(|id| id.starts_with("call_")) && calls[0]["id"] != calls[1]["id"]);

    let events = server.client.post(PATH, &ask(json!({"stream": true, "logprobs": true}))).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let (text, streamed, finish) = assembled(&events);
    assert_eq!((text.as_str(), finish), ("I look.", json!("tool_calls")));
    let functions = |calls: &[Value]| calls.iter().map(|call| call["function"].clone()).collect::<Vec<_>>();
    assert_eq!(functions(&streamed), functions(calls));
    let pieces = events.iter().filter(|e| e["choices"][0]["delta"]["tool_calls"].is_array()).count();
    assert!(pieces > 6, "arguments come piece by piece: {pieces}");
    let tokens =
        events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).map(Vec::len).sum::<usize>();
    assert_eq!(tokens, answer["usage"]["completion_tokens"].as_u64().expect("a count") as usize);
}

#[test]
fn an_answer_without_calls_is_text() {
    let server = scripted(" I am well, @john {you}");
    let choice = server.client.post(PATH, &ask(json!({}))).ok()["choices"][0].clone();
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "I am well, @john {you}", "refusal": null}));
    assert_eq!(choice["finish_reason"], "stop");
}

#[test]
fn one_call_where_several_are_not_wanted() {
    let server = scripted(" @now {}\n@now {}");
    let calls = |body: Value| {
        server.client.post(PATH, &body).ok()["choices"][0]["message"]["tool_calls"].as_array().expect("calls").len()
    };
    assert_eq!(calls(ask(json!({}))), 2);
    assert_eq!(calls(ask(json!({"parallel_tool_calls": false}))), 1);
    let events = server.client.post(PATH, &ask(json!({"parallel_tool_calls": false, "stream": true}))).events();
    assert_eq!(assembled(&events).1.len(), 1);
}

#[test]
fn none_hides_the_tools() {
    let server = TestServer::scripted("A: who?\nB: @now {}\nA: the cat");
    let choice = server.client.post(PATH, &ask(json!({"tool_choice": "none"}))).ok()["choices"][0].clone();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("@now {}"), &json!("stop")));
}

#[test]
fn calls_and_answers_are_part_of_the_conversation() {
    let prompt = "@now {}\n\nA: who?\nB: @now {\"a\": 1}\n@ the cat\nB:";
    let server = TestServer::scripted(&format!("{prompt} the dog\nA:"));
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{\"a\": 1}"}});
    let body = json!({
        "messages": [
            {"role": "user", "content": "who?"},
            {"role": "assistant", "content": null, "refusal": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "the cat"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "now"}}],
    });
    let choice = server.client.post(PATH, &body).ok()["choices"][0].clone();
    assert_eq!(choice["message"]["content"], "the dog");
    let tokens = server.client.post("/tokenize", &body).ok()["tokens"].clone();
    assert_eq!(tokens, json!(crate::support::ids(prompt)));
}

/// A model of random weights calls what it is held to.
#[test]
fn calls_that_must_be() {
    let server = server();
    let mut names = std::collections::BTreeSet::new();
    for seed in 0..6 {
        let required = ask(json!({"tool_choice": "required", "temperature": 1.3, "seed": seed, "max_tokens": 100}));
        let named = ask(
            json!({"tool_choice": {"type": "function", "function": {"name": "mat"}}, "temperature": 1.3, "seed": seed, "max_tokens": 60}),
        );
        for body in [required, named] {
            let choice = server.client.post(PATH, &body).ok()["choices"][0].clone();
            assert_eq!(choice["message"]["content"], json!(null), "{choice}");
            let calls = choice["message"]["tool_calls"].as_array().expect("calls");
            if body["tool_choice"] != "required" {
                assert!(calls.len() == 1 && calls[0]["function"]["name"] == "mat", "{choice}");
                assert_eq!(choice["finish_reason"], "tool_calls");
            }
            // Only the last one may have been cut off.
            let whole = calls.len() - usize::from(choice["finish_reason"] == "length");
            for call in &calls[..whole] {
                let arguments = call["function"]["arguments"].as_str().expect("text");
                let arguments: Value = serde_json::from_str(arguments).expect(arguments);
                names.insert(call["function"]["name"].to_string());
                if call["function"]["name"] == "mat" {
                    assert!(arguments["who"] == "cat" || arguments["who"] == "dog", "{arguments}");
                    assert!(arguments["n"].as_u64().is_some_and(|n| n <= 9), "{arguments}");
                } else {
                    assert_eq!(arguments, json!({}));
                }
            }
            let mut streamed = body.clone();
            streamed["stream"] = true.into();
            let (text, again, finish) = assembled(&server.client.post(PATH, &streamed).events());
            assert_eq!((text.as_str(), &finish), ("", &choice["finish_reason"]));
            let functions = |calls: &[Value]| calls.iter().map(|call| call["function"].clone()).collect::<Vec<_>>();
            assert_eq!(functions(&again), functions(calls), "the same, streamed");
        }
    }
    assert_eq!(names.len(), 2, "both are called: {names:?}");
}

/// The text is the model's own, and so is whether it calls; how it calls is not.
#[test]
fn strict_calls_by_choice() {
    let wayward = scripted(" I look.\n@mat {\"who\": \"cow\", \"n\": 77}");
    let call = |body: &Value| {
        let choice = wayward.client.post(PATH, body).ok()["choices"][0].clone();
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&json!("I look."), &json!("tool_calls"))
        );
        choice["message"]["tool_calls"][0]["function"].clone()
    };
    let free = call(&ask(json!({})));
    assert_eq!(free["arguments"], "{\"who\": \"cow\", \"n\": 77}", "the schema is a wish");
    for of in 0..2 {
        // Once one of them is strict, so are all.
        let mut strict = tools();
        strict[of]["function"]["strict"] = true.into();
        let mut body = ask(json!({"tools": strict, "max_tokens": 60}));
        let held = call(&body);
        let arguments: Value = serde_json::from_str(held["arguments"].as_str().expect("text")).expect("JSON");
        assert!(arguments["who"] == "cat" || arguments["who"] == "dog", "{arguments}");
        assert!(arguments["n"].as_u64().is_some_and(|n| n <= 9), "{arguments}");
        body["stream"] = true.into();
        let (text, calls, finish) = assembled(&wayward.client.post(PATH, &body).events());
        assert_eq!((text.as_str(), finish, &calls[0]["function"]), ("I look.", json!("tool_calls"), &held));
        let body = ask(json!({"tools": strict}));
        let said = scripted(" I am well, @john {you}").client.post(PATH, &body).ok()["choices"][0].clone();
        assert_eq!(said["message"]["content"], "I am well, @john {you}");
        assert_eq!(said["finish_reason"], "stop");
    }
}

#[test]
fn calls_or_a_form() {
    let form = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object",
        "properties": {"at": {"enum": ["@now {}", "\n@now {}"]}}, "required": ["at"], "additionalProperties": false}}});
    let server = server();
    let (mut of_form, mut calling) = (0, 0);
    for seed in 0..24 {
        let mut body = ask(json!({"response_format": form, "seed": seed, "temperature": 1.3, "max_tokens": 110}));
        let choice = server.client.post(PATH, &body).ok()["choices"][0].clone();
        let message = &choice["message"];
        if let Some(calls) = message["tool_calls"].as_array() {
            assert_eq!(message["content"], Value::Null, "{message}");
            assert!(calls.iter().all(|call| call["function"]["name"] == "mat" || call["function"]["name"] == "now"));
            calling += 1;
        } else {
            let text = message["content"].as_str().expect("text");
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(value["at"].is_string() && choice["finish_reason"] == "stop", "{choice}");
            of_form += 1;
        }
        body["stream"] = true.into();
        let (text, calls, finish) = assembled(&server.client.post(PATH, &body).events());
        assert_eq!(text, message["content"].as_str().unwrap_or_default());
        assert_eq!(calls.len(), message["tool_calls"].as_array().map_or(0, Vec::len));
        assert_eq!(finish, choice["finish_reason"]);
    }
    assert!(of_form > 0 && calling > 0, "{of_form} of the form, {calling} calling");
    // Where it must call the form has nothing to say, and where it may not the tools have not.
    for (choice, key) in [("required", "tool_calls"), ("none", "content")] {
        let body = ask(json!({"response_format": form, "tool_choice": choice, "seed": 1, "max_tokens": 110}));
        assert!(!server.client.post(PATH, &body).ok()["choices"][0]["message"][key].is_null(), "{choice}");
    }
}

/// The test model with a template of its own.
fn with_template(template: &str) -> TestServer {
    that_says("the cat", template)
}

/// `script` is prompt and answer.
fn that_says(script: &str, template: &str) -> TestServer {
    let mut model = served(Arc::new(ScriptedLm::new(script)));
    model.chat = ChatTemplate::from_files(None, Some(template.as_bytes())).expect("compiles");
    TestServer::start(model, Limits::default())
}

#[test]
fn templates_that_cannot_are_told_so() {
    let message = |server: &TestServer| {
        let reply = server.client.post(PATH, &ask(json!({})));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("tools")), "{}", reply.body);
        reply.json()["error"]["message"].as_str().expect("text").to_owned()
    };
    assert!(message(&with_template("{{ messages[0].content }}")).contains("knows no tools"));
    let unknown = message(&with_template("{{ tools }}{{ messages[0].content }}"));
    assert!(unknown.contains("--tool-call-parser") && unknown.contains("hermes"), "{unknown}");
    let server = with_template("{{ messages[0].content }}");
    assert_eq!(server.client.post(PATH, &ask(json!({"tool_choice": "none", "max_tokens": 2}))).status, 200);
}

#[test]
fn thoughts_in_marks_are_told_apart() {
    let body = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "the"}], "max_tokens": 60});
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        body
    };
    let message = |server: &TestServer, fields: Value| {
        let reply = server.client.post(PATH, &body(fields)).ok();
        let message = &reply["choices"][0]["message"];
        let thoughts = reply["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().expect("a count");
        (message["reasoning_content"].clone(), message["content"].clone(), thoughts > 0)
    };
    let answer = "A cat is here.</think>\n\nYes, the cat.";
    let thought = (json!("A cat is here."), json!("Yes, the cat."), true);
    // The mark is the model's, or the prompt's.
    let marked = that_says(&format!("the<think>\n{answer}"), "{{ messages[0].content }}{# </think> #}");
    assert_eq!(message(&marked, json!({})), thought);
    let opening = "{{ messages[0].content }}{{ '' if thinking is false else '<think>\n' }}{# </think> #}";
    let opened = that_says(&format!("the<think>\n{answer}"), opening);
    assert_eq!(message(&opened, json!({})), thought);
    let streamed = opened.client.post(PATH, &body(json!({"stream": true})));
    let of = |field: &str| -> String {
        streamed.events().iter().filter_map(|event| event["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!((of("reasoning_content").as_str(), of("content").as_str()), ("A cat is here.", "Yes, the cat."));
    // What is held to a form is so after the thought that the prompt begins; where it begins none, and where no token does, from the
    // first token on.
    let choice = json!({"choice": ["the cat"]});
    let held = json!({"structured_outputs": choice});
    assert_eq!(message(&opened, held.clone()), (json!("A cat is here."), json!("the cat"), true));
    let silent = json!({"structured_outputs": choice, "chat_template_kwargs": {"thinking": false}});
    assert_eq!(message(&opened, silent), (Value::Null, json!("the cat"), false));
    assert_eq!(message(&marked, held), (Value::Null, json!("the cat"), false));
    // Templates without marks tell of none.
    let unmarked = that_says(&format!("the {answer}"), "{{ messages[0].content }}");
    let (thoughts, content, counted) = message(&unmarked, json!({}));
    assert!(
        thoughts.is_null() && !counted && content.as_str().is_some_and(|text| text.contains("</think>")),
        "{content}"
    );
}

#[test]
fn variables_of_the_template() {
    let server = with_template("{{ messages[0].content }}{{ '' if thinking else 'x' }}");
    let post = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "the"}], "max_tokens": 1});
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        server.client.post(PATH, &body)
    };
    let tokens = |reply: crate::support::Reply| reply.ok()["usage"]["prompt_tokens"].clone();
    assert_eq!(tokens(post(json!({"chat_template_kwargs": {"thinking": true}}))), 1);
    assert_eq!(tokens(post(json!({"chat_template_kwargs": {"thinking": false}}))), 2);
    for (fields, param) in [
        (json!({"chat_template_kwargs": {"enable_thinking": true}}), "chat_template_kwargs.enable_thinking"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages"),
        (json!({"reasoning_effort": "low"}), "reasoning_effort"),
    ] {
        let reply = post(fields);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{}", reply.body);
    }
}

#[test]
fn impossible_tools_name_their_field() {
    let server = server();
    let tool = |function: Value| json!([{"type": "function", "function": function}]);
    for (fields, param) in [
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [3]}), "tools[0]"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": tool(json!({}))}), "tools[0].function.name"),
        (json!({"tools": tool(json!({"name": "a b"}))}), "tools[0].function.name"),
        (json!({"tools": tool(json!({"name": "a", "parameters": 3}))}), "tools[0].function.parameters"),
        (json!({"tools": tool(json!({"name": "a", "more": 3}))}), "tools[0].function.more"),
        (json!({"tools": tool(json!({"name": "a", "strict": 1}))}), "tools[0].function.strict"),
        (json!({"tools": tool(json!({"name": "a", "strict": true, "parameters": {"type": "nonsense"}}))}), "tools"),
        (json!({"tools": tool(json!({"name": "a", "description": "x".repeat(200_000)}))}), "tools"),
        (json!({"tools": [tools()[1], tools()[1]]}), "tools[1]"),
        (
            json!({"tools": tool(json!({"name": "a", "parameters": {"type": "nonsense"}})), "tool_choice": "required"}),
            "tools",
        ),
        (json!({"tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "other"}}}), "tool_choice"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (json!({"parallel_tool_calls": 1}), "parallel_tool_calls"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs"),
        (json!({"functions": []}), "functions"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
        (json!({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}), "messages[0].tool_calls"),
        (json!({"messages": [{"role": "assistant", "tool_calls": []}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}),
            "messages[0].tool_calls[0].function",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "x", "arguments": "[1]"}}]}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ] {
        let reply = server.client.post(PATH, &ask(fields.clone()));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{fields}: {}", reply.body);
    }
}

#[test]
fn what_clients_parsed_of_an_answer_is_taken_back() {
    let server = with_template("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}{{ tools }}");
    let call =
        json!({"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}", "parsed_arguments": {}}});
    let messages = json!([
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "{\"a\": 1}", "refusal": null, "tool_calls": null, "annotations": [], "parsed": {"a": 1}},
        {"role": "assistant", "content": null, "tool_calls": [call], "parsed": null},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
        {"role": "user", "content": "cat"},
    ]);
    server.client.post(PATH, &json!({"messages": messages, "max_tokens": 1, "store": false})).ok();
    for (fields, param) in
        [(json!({"annotations": [1]}), "messages[0].annotations"), (json!({"unknown": 1}), "messages[0].unknown")]
    {
        let mut message = json!({"role": "assistant", "content": "x"});
        message.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        let reply = server.client.post(PATH, &json!({"messages": [message]}));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{}", reply.body);
    }
}
