//! [`Form`]: how a family writes a call, as text around its name and arguments; and the grammar of that.

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

/// The texts around a call.
#[derive(Debug)]
pub(super) struct Form {
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

    /// One to `count` calls of `tools`, in llguidance's variant of Lark. `special_id` knows the tokens that no text makes.
    pub(super) fn grammar(&self, tools: &[Tool], count: usize, special_id: impl Fn(&str) -> Option<u32>) -> String {
        let literal = |text: &str| self.literal(text, &special_id);
        let more = match count {
            0 | 1 => String::new(),
            count => format!(" more{{0,{}}}", count - 1),
        };
        let calls: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
        let mut lark =
            format!("start: {} call{more} {}\ncall: {}\n", literal(self.begin), literal(self.end), calls.join(" | "));
        if count > 1 {
            lark.push_str(&format!("more: {} call\n", literal(self.between)));
        }
        for (i, tool) in tools.iter().enumerate() {
            let head = literal(&[self.before_name, &tool.name, self.after_name].concat());
            let arguments = match self.arguments {
                Arguments::Json => json_of(tool.parameters.clone()),
                Arguments::Tagged => tagged(&tool.parameters, &literal),
            };
            lark.push_str(&format!("call_{i}: {head} {arguments} {}\n", literal(self.after_arguments)));
        }
        lark + "RAW: /[^<]*/\n"
    }

    /// A text in Lark, its special tokens by their ids.
    fn literal(&self, text: &str, special_id: impl Fn(&str) -> Option<u32>) -> String {
        let mut parts = Vec::new();
        let mut rest = text;
        let quoted = |text: &str| Value::from(text).to_string();
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
