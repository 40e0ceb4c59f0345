//! Chat templates: what transformers makes of them, by the script beside the fixtures.

use moe_serve::text::{ChatMessage, ChatTemplate, Tool, ToolCall};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn message(value: &Value) -> ChatMessage {
    let call = |call: &Value| ToolCall {
        id: text(&call["id"]).expect("an id"),
        name: text(&call["function"]["name"]).expect("a name"),
        arguments: call["function"]["arguments"].as_object().expect("an object").clone(),
    };
    ChatMessage {
        role: text(&value["role"]).expect("a role"),
        content: text(&value["content"]),
        tool_calls: value["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
        tool_call_id: text(&value["tool_call_id"]),
        name: text(&value["name"]),
        reasoning: None,
    }
}

fn tool(value: &Value) -> Tool {
    let function = &value["function"];
    let parameters = function["parameters"].as_object().expect("a schema").clone();
    Tool { name: text(&function["name"]).expect("a name"), parameters, definition: value.clone() }
}

/// Renders every template of a folder for every conversation; returns how many prompts were equal.
fn check(folder: &Path) -> usize {
    let fixture: Value = serde_json::from_slice(&read(&folder.join("expected.json"))).expect("JSON");
    let mut equal = 0;
    let mut failures = Vec::new();
    for (name, cases) in fixture["expected"].as_object().expect("templates") {
        let tokens = fixture["tokens"].to_string();
        let template = ChatTemplate::from_files(Some(tokens.as_bytes()), Some(&read(&folder.join(name))));
        let template = template.unwrap_or_else(|e| panic!("{name}: {e}"));
        for (case, want) in cases.as_object().expect("cases") {
            let conversation = &fixture["conversations"][case];
            let messages: Vec<ChatMessage> =
                conversation["messages"].as_array().expect("messages").iter().map(message).collect();
            let tools: Vec<Tool> = conversation["tools"].as_array().into_iter().flatten().map(tool).collect();
            let variables = conversation["variables"].as_object().cloned().unwrap_or_else(Map::new);
            match (template.render_with(&messages, &tools, &variables), want.as_str()) {
                (Ok(got), Some(want)) if got == want => equal += 1,
                (Err(_), None) => equal += 1,
                (got, want) => failures.push(format!("{name}, {case}:\n got {got:?}\nwant {want:?}")),
            }
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), equal + failures.len(), failures.join("\n"));
    equal
}

#[test]
fn prompts_are_those_of_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates");
    assert_eq!(check(&folder), 50);
}

#[test]
#[ignore = "needs a folder of published templates, CHAT_TEMPLATES"]
fn prompts_of_published_templates_are_those_of_transformers() {
    let folder = std::env::var_os("CHAT_TEMPLATES").map(PathBuf::from).expect("CHAT_TEMPLATES");
    println!("{} prompts are equal", check(&folder));
}
