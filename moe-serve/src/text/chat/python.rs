//! Values written as Python writes them, for templates are made to be run there: `json.dumps` and `str`.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value as Jinja};
use serde_json::Value;
use std::fmt::Write as _;

/// How `json.dumps` is asked to write.
#[derive(Debug, Clone)]
pub(super) struct JsonStyle {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Default for JsonStyle {
    fn default() -> Self {
        Self {
            indent: None,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
            sort_keys: false,
            ensure_ascii: false,
        }
    }
}

impl JsonStyle {
    /// Of the filter's arguments. Spaces of an indent are bounded, for they are written for every value.
    fn from_arguments(arguments: &Kwargs) -> Result<Self, Error> {
        let mut style = Self::default();
        if let Some(indent) = arguments.get::<Option<Jinja>>("indent")?.filter(|indent| !indent.is_none()) {
            let spaces = || usize::try_from(indent.clone()).ok().filter(|&spaces| spaces <= 16).map(|n| " ".repeat(n));
            let text = indent.as_str().filter(|text| text.len() <= 16).map(str::to_owned).or_else(spaces);
            let wrong = || Error::new(ErrorKind::InvalidOperation, "tojson: indent should be at most 16");
            style.indent = Some(text.ok_or_else(wrong)?);
            style.item_separator = ",".into();
        }
        if let Some(separators) = arguments.get::<Option<Jinja>>("separators")?.filter(|value| !value.is_none()) {
            let texts: Vec<String> = separators.try_iter()?.map(|text| text.to_string()).collect();
            let [item, key] = <[String; 2]>::try_from(texts)
                .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators should be two strings"))?;
            (style.item_separator, style.key_separator) = (item, key);
        }
        style.sort_keys = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
        style.ensure_ascii = arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
        arguments.assert_all_used()?;
        Ok(style)
    }
}

/// The filter `tojson` of Hugging Face's templates, which escapes nothing for HTML.
pub(super) fn tojson(value: Jinja, arguments: Kwargs) -> Result<Jinja, Error> {
    let style = JsonStyle::from_arguments(&arguments)?;
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson: the value is not defined"));
    }
    let value =
        serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    Ok(to_json(&value, &style).into())
}

/// JSON as `json.dumps` writes it.
pub(super) fn to_json(value: &Value, style: &JsonStyle) -> String {
    let mut text = String::new();
    write_json(value, style, 0, &mut text);
    text
}

fn write_json(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) {
    match value {
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                begin_item(style, i, depth + 1, out);
                write_json(item, style, depth + 1, out);
            }
            new_line(style, depth, out);
            out.push(']');
        }
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            if style.sort_keys {
                fields.sort_by_key(|(key, _)| *key);
            }
            out.push('{');
            for (i, (key, value)) in fields.into_iter().enumerate() {
                begin_item(style, i, depth + 1, out);
                write_string(key, style.ensure_ascii, out);
                out.push_str(&style.key_separator);
                write_json(value, style, depth + 1, out);
            }
            new_line(style, depth, out);
            out.push('}');
        }
        Value::String(text) => write_string(text, style.ensure_ascii, out),
        Value::Number(number) if number.is_f64() => out.push_str(&float(number.as_f64().unwrap_or_default())),
        Value::Null | Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
    }
}

fn begin_item(style: &JsonStyle, index: usize, depth: usize, out: &mut String) {
    if index > 0 {
        out.push_str(&style.item_separator);
    }
    new_line(style, depth, out);
}

fn new_line(style: &JsonStyle, depth: usize, out: &mut String) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(indent));
    }
}

fn write_string(text: &str, ensure_ascii: bool, out: &mut String) {
    let quoted = Value::from(text).to_string();
    if !ensure_ascii {
        out.push_str(&quoted);
        return;
    }
    for c in quoted.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}").ok();
            }
        }
    }
}

/// The shortest digits that give the number back; with an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) && x.is_finite() {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(("+", exponent), |exponent| ("-", exponent));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = x.to_string();
    if text.contains('.') || !x.is_finite() { text } else { text + ".0" }
}

/// What `str` makes of a value.
pub(super) fn to_str(value: &Jinja) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

fn repr(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
        }
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter().into_iter().flatten().map(|item| repr(&item));
            format!("[{}]", items.collect::<Vec<_>>().join(", "))
        }
        ValueKind::Map => {
            let entry = |key: Jinja| {
                format!("{}: {}", repr(&key), value.get_item(&key).map_or_else(|_| String::new(), |v| repr(&v)))
            };
            format!("{{{}}}", value.try_iter().into_iter().flatten().map(entry).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => {
                write!(out, "\\x{:02x}", u32::from(c)).ok();
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Prints what stands between `{{` and `}}`.
pub(super) fn print(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Jinja) -> Result<(), Error> {
    out.write_str(&to_str(value)).map_err(|_| Error::new(ErrorKind::WriteFailure, "the prompt could not be written"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Wanted: what Python 3.11 prints for these.
    #[test]
    fn floats() {
        for (x, want) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0, "0.0"),
        ] {
            assert_eq!(float(x), want);
        }
    }

    #[test]
    fn json_styles() {
        let value = json!({"b": [1, {"x": "é\n\u{1f600}"}], "a": {}, "c": []});
        let style = JsonStyle::default();
        assert_eq!(to_json(&value, &style), "{\"b\": [1, {\"x\": \"é\\n😀\"}], \"a\": {}, \"c\": []}");
        let ascii = JsonStyle { ensure_ascii: true, sort_keys: true, ..style.clone() };
        assert_eq!(
            to_json(&value, &ascii),
            "{\"a\": {}, \"b\": [1, {\"x\": \"\\u00e9\\n\\ud83d\\ude00\"}], \"c\": []}"
        );
        let indent = JsonStyle { indent: Some("  ".into()), item_separator: ",".into(), ..style };
        assert_eq!(
            to_json(&json!({"b": [1, 2], "a": {}}), &indent),
            "{\n  \"b\": [\n    1,\n    2\n  ],\n  \"a\": {}\n}"
        );
    }

    #[test]
    fn printed_values() {
        let value = Jinja::from(minijinja::value::Serde(json!({"a": [true, null, 1, 1.0, "it's", "\"'\n"]})));
        assert_eq!(to_str(&value), r#"{'a': [True, None, 1, 1.0, "it's", '"\'\n']}"#);
        assert_eq!(to_str(&Jinja::from("text")), "text");
    }
}
