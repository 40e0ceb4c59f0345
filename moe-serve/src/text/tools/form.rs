//! [`Form`]: how a family writes a call, as text around its name and arguments; and the grammar of that.
//!
//! What else an answer may say is `free.rs`.

use crate::text::chat::Tool;
use crate::text::grammar::on_one_line;
use serde_json::{Map, Value};

/// How the ids of calls look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallIds {
    /// `call_` and 16 digits.
    Long,
    /// Nine letters and digits.
    Nine,
}

/// How the arguments of a call are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arguments {
    /// An object.
    Json,
    /// As in GLM-4.5: a pair of tags for each key and each value, strings without quotes.
    Tagged,
}

/// What an answer that may call says before, or instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// Text, which ends where one of these begins; calls begin with the first of them.
    Text(&'static [&'static str]),
    /// Nothing: text that does not begin as a call does, and has none of these, is the whole answer.
    Nothing(&'static [&'static str]),
    /// Lines: one that begins as a call does is one.
    Lines,
    /// Messages of their own, as in gpt-oss' answers.
    Messages,
}

/// The texts around a call.
#[derive(Debug)]
pub(super) struct Form {
    pub(super) before: Before,
    /// Before the first call.
    pub(super) begin: &'static str,
    pub(super) before_name: &'static str,
    pub(super) after_name: &'static str,
    pub(super) after_arguments: &'static str,
    /// Between two calls.
    pub(super) between: &'static str,
    /// After the last call.
    pub(super) end: &'static str,
    pub(super) arguments: Arguments,
    /// Whether an answer may hold several calls.
    pub(super) parallel: bool,
    /// Tokens that say where calls are. Where they are special ones of a tokenizer, a text does not show them unasked.
    pub(super) markers: &'static [&'static str],
    /// Whether these also tell other parts of an answer apart.
    pub(super) always_reads: bool,
    pub(super) call_ids: CallIds,
}

impl Form {
    /// What most families have in common.
    pub(super) const JSON: Self = Self {
        before: Before::Text(&[]),
        begin: "",
        before_name: "",
        after_name: "",
        after_arguments: "",
        between: "",
        end: "",
        arguments: Arguments::Json,
        parallel: true,
        markers: &[],
        always_reads: false,
        call_ids: CallIds::Long,
    };

    pub(super) fn call_id(&self, bits: u64) -> String {
        match self.call_ids {
            CallIds::Long => format!("call_{bits:016x}"),
            CallIds::Nine => format!("{bits:016x}")[7..].to_owned(),
        }
    }

    /// What a call begins with, up to its arguments.
    pub(super) fn head(&self, tool: &Tool) -> String {
        [self.before_name, &tool.name, self.after_name].concat()
    }

    /// An answer of one to `count` calls of `tools`, in llguidance's variant of Lark. `special_id` knows the tokens that no text makes.
    pub(super) fn grammar(&self, tools: &[Tool], count: usize, special_id: impl Fn(&str) -> Option<u32>) -> String {
        format!("start: calls\n{}", self.calls(tools, count, &special_id))
    }

    /// The same, or an answer of the grammar named `form`.
    pub(super) fn grammar_or_form(
        &self,
        tools: &[Tool],
        count: usize,
        special_id: impl Fn(&str) -> Option<u32>,
    ) -> String {
        format!("start: calls | @form\n{}", self.calls(tools, count, &special_id))
    }

    /// The rule `calls`, and `further` for those after the first.
    pub(super) fn calls(&self, tools: &[Tool], count: usize, special_id: &impl Fn(&str) -> Option<u32>) -> String {
        let literal = |text: &str| self.literal(text, special_id);
        let mut lark = format!("calls: {} call further\n", literal(self.begin));
        let names: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
        lark.push_str(&format!("call: {}\n", names.join(" | ")));
        lark.push_str(&match count {
            0 | 1 => format!("further: {}\n", literal(self.end)),
            count => {
                format!(
                    "further: more{{0,{}}} {}\nmore: {} call\n",
                    count - 1,
                    literal(self.end),
                    literal(self.between)
                )
            }
        });
        for (i, tool) in tools.iter().enumerate() {
            let arguments = match self.arguments {
                Arguments::Json => json_of(tool.parameters.clone()),
                Arguments::Tagged => tagged(&tool.parameters, &literal),
            };
            lark.push_str(&format!("call_{i}: {} tail_{i}\n", literal(&self.head(tool))));
            lark.push_str(&format!("tail_{i}: {arguments} {}\n", literal(self.after_arguments)));
        }
        lark + "RAW: /[^<]*/\n"
    }

    /// A text in Lark, its special tokens by their ids.
    pub(super) fn literal(&self, text: &str, special_id: impl Fn(&str) -> Option<u32>) -> String {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let special = |marker: &&str| Some((rest.find(*marker)?, marker.len(), special_id(marker)?));
            let Some((at, len, id)) = self.markers.iter().filter_map(special).min() else { break };
            if at > 0 {
                parts.push(quoted(&rest[..at]));
            }
            parts.push(format!("<[{id}]>"));
            rest = &rest[at + len..];
        }
        if !rest.is_empty() || parts.is_empty() {
            parts.push(quoted(rest));
        }
        parts.join(" ")
    }
}

/// A text as a string of Lark, which one of JSON is too.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// JSON of a schema.
fn json_of(schema: Map<String, Value>) -> String {
    format!("%json {}", on_one_line(Value::Object(schema)))
}

/// Each property in the schema's order, those that are not required or not.
fn tagged(parameters: &Map<String, Value>, literal: &impl Fn(&str) -> String) -> String {
    let properties = parameters.get("properties").and_then(Value::as_object).into_iter().flatten();
    let required = parameters.get("required").and_then(Value::as_array);
    let pair = |(key, schema): (&String, &Value)| {
        let open = literal(&format!("<arg_key>{key}</arg_key>\n<arg_value>"));
        let value = tagged_value(schema, parameters, literal);
        let pair = format!("{open} {value} {}", literal("</arg_value>\n"));
        let is_required = required.is_some_and(|required| required.iter().any(|name| name == key.as_str()));
        if is_required { pair } else { format!("({pair})?") }
    };
    properties.map(pair).collect::<Vec<_>>().join(" ")
}

fn tagged_value(schema: &Value, parameters: &Map<String, Value>, literal: &impl Fn(&str) -> String) -> String {
    let texts =
        schema["enum"].as_array().and_then(|values| values.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    match (texts, schema) {
        (Some(texts), _) if !texts.is_empty() => {
            format!("({})", texts.into_iter().map(literal).collect::<Vec<_>>().join(" | "))
        }
        // A tag would end it.
        (_, schema) if schema["type"] == "string" => "RAW".to_owned(),
        (_, Value::Object(schema)) => {
            // What the property refers to lies beside it.
            let mut schema = schema.clone();
            let shared = ["$defs", "definitions"].into_iter().filter_map(|key| Some((key, parameters.get(key)?)));
            schema.extend(shared.map(|(key, value)| (key.to_owned(), value.clone())));
            json_of(schema)
        }
        _ => json_of(Map::new()),
    }
}
