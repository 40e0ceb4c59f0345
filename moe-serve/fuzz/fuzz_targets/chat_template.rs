//! A chat template: refused with its file's name, or rendered for a conversation with tools, or refuses that.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::Error;
use moe_serve::text::{ChatMessage, ChatTemplate, Tool, ToolCall};
use serde_json::{Map, json};

fuzz_target!(|source: &[u8]| {
    let template = match ChatTemplate::from_files(Some(br#"{"bos_token": "<s>"}"#), Some(source)) {
        Ok(template) => template,
        Err(Error::Template(_) | Error::ModelFile { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let arguments: Map<_, _> =
        [("city".to_owned(), json!("Malmö")), ("days".to_owned(), json!([1.5, null]))].into_iter().collect();
    let call = ToolCall { id: "call_1".into(), name: "weather".into(), arguments: arguments.clone() };
    let messages = [
        ChatMessage::new("system", "Be brief."),
        ChatMessage::new("user", "Hi {{ 1 }}"),
        ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() },
        ChatMessage { tool_call_id: Some("call_1".into()), ..ChatMessage::new("tool", "{}") },
    ];
    let definition = json!({"type": "function", "function": {"name": "weather", "parameters": arguments}});
    let tool = Tool { name: "weather".into(), parameters: arguments, definition };
    for tools in [&[][..], &[tool]] {
        match template.render_with(&messages, tools, &Map::new()) {
            Ok(_) | Err(Error::Template(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
});
