//! An answer that may call tools, in the form that its first byte chooses: read the same whole and in pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::text::{AnswerPart, Tool, ToolFormat};
use serde_json::{Map, json};

/// What an answer says, whatever pieces it came in.
fn told(parts: &[AnswerPart]) -> String {
    let one = |part: &AnswerPart| match part {
        AnswerPart::Text(text) | AnswerPart::Reasoning(text) | AnswerPart::Arguments(text) => text.clone(),
        AnswerPart::Call(name) => format!("|{name}|"),
    };
    parts.iter().map(one).collect()
}

fuzz_target!(|input: (u8, &str)| {
    let (choice, text) = input;
    let names = ToolFormat::all_names();
    let format = ToolFormat::named(names[usize::from(choice) % names.len()]).expect("a name");
    let tool = Tool { name: "now".into(), parameters: Map::new(), definition: json!({}) };
    let read = |pieces: &[String]| {
        let mut parser = format.parser(std::slice::from_ref(&tool));
        let mut parts: Vec<AnswerPart> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
        parts.extend(parser.finish());
        told(&parts)
    };
    let characters: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(read(&[text.to_owned()]), read(&characters), "{}", format.name());
});
