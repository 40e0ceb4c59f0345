//! `response_format` (OpenAI) and `structured_outputs` (vLLM): what an answer may say.

use super::fields::{Fields, inside, wrong};
use super::limits::{MAX_CHOICE_TEXTS, MAX_GRAMMAR_BYTES};
use crate::text::GrammarSource;
use crate::{Error, Result};
use serde_json::{Map, Value};

/// What an answer may say, and the field that says so.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) source: GrammarSource,
    pub(super) field: &'static str,
}

/// The grammar of a request, if it has one.
pub(super) fn take_grammar(fields: &mut Fields) -> Result<Option<Wanted>> {
    let format = match fields.object("response_format")? {
        Some(format) => response_format(format).map_err(|error| inside("response_format", error))?,
        None => None,
    };
    let outputs = match fields.object("structured_outputs")? {
        Some(outputs) => Some(structured_outputs(outputs).map_err(|error| inside("structured_outputs", error))?),
        None => None,
    };
    match (format, outputs) {
        (Some(_), Some(_)) => {
            let text = "`structured_outputs` and `response_format` exclude each other; leave one out";
            Err(Error::field("structured_outputs", text))
        }
        (Some(source), None) => Ok(Some(Wanted { source, field: "response_format" })),
        (None, outputs) => Ok(outputs.map(|source| Wanted { source, field: "structured_outputs" })),
    }
}

/// One of OpenAI's forms, none for text.
pub(super) fn response_format(format: Map<String, Value>) -> Result<Option<GrammarSource>> {
    let mut fields = Fields::new(format);
    let kind = fields.text("type")?.unwrap_or_default();
    let source = match kind.as_str() {
        "text" => None,
        "json_object" => Some(GrammarSource::JsonObject),
        "json_schema" => {
            let schema = fields.object("json_schema")?.ok_or_else(|| missing("json_schema"))?;
            Some(json_schema(schema).map_err(|error| inside("json_schema", error))?)
        }
        _ => return Err(wrong("type", "text, json_object or json_schema", &Value::String(kind))),
    };
    fields.finish(&[])?;
    Ok(source)
}

/// Answers are held to the schema whether `strict` says so or not.
fn json_schema(schema: Map<String, Value>) -> Result<GrammarSource> {
    let mut fields = Fields::new(schema);
    fields.text("name")?;
    fields.text("description")?;
    fields.boolean("strict")?;
    let schema = fields.take("schema").ok_or_else(|| missing("schema"))?;
    fields.finish(&[])?;
    check_size("schema", &schema.to_string())?;
    Ok(GrammarSource::JsonSchema(schema))
}

fn structured_outputs(outputs: Map<String, Value>) -> Result<GrammarSource> {
    let mut fields = Fields::new(outputs);
    let json = fields.take("json");
    let (regex, grammar, choice) = (fields.text("regex")?, fields.text("grammar")?, fields.take("choice"));
    let json_object = fields.boolean("json_object")?.filter(|&wanted| wanted);
    fields.finish(&["structural_tag", "whitespace_pattern", "disable_any_whitespace", "disable_fallback"])?;
    let mut sources = Vec::new();
    if let Some(schema) = json {
        check_size("json", &schema.to_string())?;
        // vLLM takes a schema as text too.
        let schema = match schema {
            Value::String(text) => serde_json::from_str(&text).map_err(|e| {
                Error::field("json", format!("`json`: expected a JSON schema, found text that is none: {e}"))
            })?,
            schema => schema,
        };
        sources.push(GrammarSource::JsonSchema(schema));
    }
    if let Some(regex) = regex {
        check_size("regex", &regex)?;
        sources.push(GrammarSource::Regex(regex));
    }
    if let Some(grammar) = grammar {
        check_size("grammar", &grammar)?;
        sources.push(GrammarSource::Lark(grammar));
    }
    if let Some(choice) = choice {
        sources.push(GrammarSource::Choice(choices(&choice)?));
    }
    sources.extend(json_object.map(|_| GrammarSource::JsonObject));
    match <[GrammarSource; 1]>::try_from(sources) {
        Ok([source]) => Ok(source),
        Err(sources) => {
            let text =
                format!("expected one of `json`, `json_object`, `regex`, `choice`, `grammar`, found {}", sources.len());
            Err(Error::field("json", text))
        }
    }
}

fn choices(value: &Value) -> Result<Vec<String>> {
    let texts = value.as_array().filter(|texts| (1..=MAX_CHOICE_TEXTS).contains(&texts.len()));
    let text = |text: &Value| text.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let texts: Option<Vec<String>> = texts.and_then(|texts| texts.iter().map(text).collect());
    let expected = format!("1 to {MAX_CHOICE_TEXTS} texts, none empty");
    let texts = texts.ok_or_else(|| wrong("choice", &expected, value))?;
    check_size("choice", &texts.concat())?;
    Ok(texts)
}

fn check_size(field: &str, text: &str) -> Result<()> {
    if text.len() > MAX_GRAMMAR_BYTES {
        let text = format!("`{field}`: expected at most {MAX_GRAMMAR_BYTES} bytes, found {}", text.len());
        return Err(Error::field(field, text));
    }
    Ok(())
}

fn missing(field: &str) -> Error {
    Error::field(field, format!("`{field}` is missing"))
}
