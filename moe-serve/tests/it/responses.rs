//! `/v1/responses`.

use crate::gpt::server;
use crate::support::{TestServer, ids};
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";
const ANSWER: &str = "I am well, and you?";

fn scripted() -> TestServer {
    TestServer::scripted("A: how are you?\nB: I am well, and you?\nA: the cat")
}

/// The events of a stream: each bears its type's name, and they are numbered.
fn events(server: &TestServer, body: &Value) -> Vec<Value> {
    let reply = server.client.post(PATH, body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.headers.contains("content-type: text/event-stream"), "{}", reply.headers);
    let frames = reply.body.trim_end().split("\n\n");
    let event = |(i, frame): (usize, &str)| {
        let (name, data) = frame.split_once('\n').expect("two lines");
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").expect(frame)).expect(data);
        assert_eq!(name, format!("event: {}", event["type"].as_str().expect("a type")));
        assert_eq!(event["sequence_number"], i);
        event
    };
    frames.enumerate().map(event).collect()
}

fn types(events: &[Value]) -> Vec<&str> {
    let mut types: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    types.dedup();
    types
}

#[test]
fn a_text_is_answered() {
    let answer = scripted().client.post(PATH, &json!({"input": "how are you?", "temperature": 0})).ok();
    assert_eq!(
        (&answer["object"], &answer["status"], &answer["store"]),
        (&json!("response"), &json!("completed"), &json!(false))
    );
    let message = &answer["output"][0];
    assert_eq!(
        (&message["type"], &message["role"], &message["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    assert_eq!(message["content"], json!([{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]));
    assert_eq!(answer["usage"]["input_tokens"], ids("A: how are you?\nB:").len());
    assert!(answer["id"].as_str().is_some_and(|id| id.starts_with("resp_")));
}

#[test]
fn a_conversation_comes_whole() {
    let prompt = "the cat\n\n@now {}\n\n";
    let talk = "A: hi\nB: the dog @now {\"a\": 1}\n@ the mat\nA: and?\nB:";
    // Tools come first in the dialogue format.
    let server = TestServer::scripted(&format!("@now {{}}\n\nthe cat\n\n{talk} well\nA:"));
    let body = json!({
        "instructions": "the cat",
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "the dog", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "now", "arguments": "{\"a\": 1}", "status": "completed"},
            {"type": "function_call_output", "call_id": "call_1", "output": "the mat"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "and?"}]},
        ],
        "tools": [{"type": "function", "name": "now", "parameters": null, "strict": null}],
    });
    let answer = server.client.post(PATH, &body).ok();
    assert_eq!(answer["output"][0]["content"][0]["text"], "well", "{prompt}{talk}");
    assert_eq!((&answer["instructions"], &answer["tools"]), (&body["instructions"], &body["tools"]));
}

#[test]
fn a_stream_tells_items_parts_and_text() {
    let server = scripted();
    let events = events(&server, &json!({"input": "how are you?", "stream": true, "store": false}));
    let want = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(types(&events), want);
    let text: String = events.iter().filter(|e| e["type"] == want[4]).filter_map(|e| e["delta"].as_str()).collect();
    assert_eq!(text, ANSWER);
    let last = &events.last().expect("events")["response"];
    assert_eq!(last["output"][0]["content"][0]["text"], ANSWER);
    assert!(last["usage"]["output_tokens"].as_u64() > Some(0));
    assert_eq!(last["output"][0]["id"], events[2]["item"]["id"]);
}

#[test]
fn calls_are_items() {
    let server = server();
    let tool = json!({"type": "function", "name": "mat", "strict": true, "parameters": {"type": "object",
        "properties": {"who": {"enum": ["cat", "dog"]}}, "required": ["who"], "additionalProperties": false}});
    let mut body =
        json!({"input": "who?", "tools": [tool], "tool_choice": {"type": "function", "name": "mat"}, "seed": 3});
    let answer = server.client.post(PATH, &body).ok();
    let item = &answer["output"][0];
    assert_eq!(
        (&item["type"], &item["name"], &item["status"]),
        (&json!("function_call"), &json!("mat"), &json!("completed"))
    );
    let arguments: Value = serde_json::from_str(item["arguments"].as_str().expect("text")).expect("JSON");
    assert!(arguments["who"] == "cat" || arguments["who"] == "dog", "{arguments}");
    body["stream"] = true.into();
    let events = events(&server, &body);
    let want = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(types(&events), want);
    assert_eq!(events.last().expect("events")["response"]["output"][0]["arguments"], item["arguments"]);
}

#[test]
fn a_form_and_an_end() {
    let server = server();
    let format = json!({"type": "json_schema", "name": "n", "schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"], "additionalProperties": false}, "strict": true});
    let answer = server.client.post(PATH, &json!({"input": "a number", "text": {"format": format}, "seed": 1})).ok();
    let text = answer["output"][0]["content"][0]["text"].as_str().expect("text").to_owned();
    if answer["status"] == "completed" {
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert!(value["n"] == 1 || value["n"] == 2, "{text}");
    }
    let short = server.client.post(PATH, &json!({"input": "the", "max_output_tokens": 2})).ok();
    assert_eq!(
        (&short["status"], &short["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
}

#[test]
fn text_tells_how_likely_it_was() {
    let server = scripted();
    let mut body = json!({"input": "how are you?", "include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let answer = server.client.post(PATH, &body).ok();
    let part = answer["output"][0]["content"][0].clone();
    let logprobs = part["logprobs"].as_array().expect("asked for");
    let said: String = logprobs.iter().map(|logprob| logprob["token"].as_str().expect("a token")).collect();
    assert_eq!(said.trim_start(), ANSWER, "every token of the text, and no other");
    assert!(logprobs.iter().all(|logprob| logprob["logprob"].as_f64().is_some_and(|p| p <= 0.0)));
    assert!(logprobs.iter().all(|logprob| logprob["top_logprobs"].as_array().is_some_and(|top| top.len() == 2)));
    assert_eq!(answer["top_logprobs"], 2);
    body["stream"] = true.into();
    let events = events(&server, &body);
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let streamed: Vec<Value> = deltas.flat_map(|event| event["logprobs"].as_array().expect("a list").clone()).collect();
    assert_eq!(&streamed, logprobs);
    let done = events.iter().find(|event| event["type"] == "response.output_text.done").expect("an end");
    assert_eq!(done["logprobs"], part["logprobs"]);
    // What was answered can be given back.
    let item = &answer["output"][0];
    let input = json!([{"role": "user", "content": "how are you?"}, item, {"role": "user", "content": "and?"}]);
    server.client.post(PATH, &json!({"input": input, "max_output_tokens": 1})).ok();
}

#[test]
fn calls_do_not_tell_how_likely_they_were() {
    let tool = json!({"type": "function", "name": "now"});
    let body = json!({"input": "who?", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": false,
        "include": ["message.output_text.logprobs"], "max_output_tokens": 40});
    let answer = server().client.post(PATH, &body).ok();
    let kinds: Vec<&Value> = answer["output"].as_array().expect("items").iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["function_call"]);
}

#[test]
fn impossible_requests_name_their_field() {
    let server = scripted();
    let input = |item: Value| json!({"input": [item]});
    for (fields, param) in [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ["hi"]}), "input[0]"),
        (input(json!({"type": "item_reference", "id": "x"})), "input[0].type"),
        (input(json!({"role": "robot", "content": "hi"})), "input[0].role"),
        (input(json!({"role": "user", "content": [{"type": "input_image"}]})), "input[0].content[0]"),
        (input(json!({"role": "user", "content": "hi", "more": 1})), "input[0].more"),
        (input(json!({"type": "function_call_output", "output": "x"})), "input[0].call_id"),
        (input(json!({"role": "user", "content": "hi", "status": {}})), "input[0].status"),
        (input(json!({"type": "reasoning", "summary": "x"})), "input[0].summary"),
        (json!({"store": true}), "store"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"include": "x"}), "include"),
        (json!({"include": ["reasoning.encrypted_content"]}), "include[0]"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"include": ["message.output_text.logprobs"], "top_logprobs": 21}), "top_logprobs"),
        (json!({"n": 2}), "n"),
        (json!({"response_format": {"type": "text"}}), "response_format"),
        (json!({"stream": true, "stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"return_expert_choices": true}), "return_expert_choices"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type"),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
        (json!({"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}), "text.format"),
        (json!({"reasoning": {"effort": "low"}}), "reasoning.effort"),
        (json!({"reasoning": {"summary": "auto"}}), "reasoning.summary"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function", "name": "a", "strict": 1}]}), "tools[0].strict"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"messages": []}), "messages"),
        (json!({"input": "the cat sat ".repeat(400)}), "input"),
    ] {
        let mut body = json!({"input": "hi"});
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        let reply = server.client.post(PATH, &body);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{fields}: {}", reply.body);
    }
}
