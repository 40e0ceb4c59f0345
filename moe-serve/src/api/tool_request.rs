//! `tools`, `tool_choice` and `parallel_tool_calls`: what the model may call, and whether it must.

use super::fields::{Fields, inside, wrong};
use super::limits::{MAX_TOOL_NAME_BYTES, MAX_TOOLS, MAX_TOOLS_BYTES};
use crate::text::{GrammarSource, Tool, ToolFormat};
use crate::{Error, Result, ServedModel};
use serde_json::{Map, Value, json};

/// Whether an answer calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ToolChoice {
    /// It cannot; the model is not shown the tools.
    None,
    /// The model decides.
    Auto,
    /// One tool or several, which the model chooses.
    Required,
    /// This one.
    Named(String),
}

/// The tools of a request.
#[derive(Debug, Clone)]
pub(super) struct ToolUse {
    /// None, if the model may call none.
    pub(super) tools: Vec<Tool>,
    pub(super) choice: ToolChoice,
    /// Whether an answer may hold several calls.
    pub(super) parallel: bool,
}

/// How the definitions of tools lie on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToolShape {
    /// In chats: `{"type": "function", "function": {"name": ...}}`.
    Nested,
    /// In responses: `{"type": "function", "name": ...}`.
    Flat,
}

impl ToolUse {
    pub(super) fn take(fields: &mut Fields, shape: ToolShape, model: &ServedModel) -> Result<Self> {
        let tools = match fields.take("tools") {
            Some(tools) => take_tools(tools, shape)?,
            None => Vec::new(),
        };
        let choice = take_choice(fields.take("tool_choice"), &tools, shape)?;
        let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        if choice == ToolChoice::None {
            return Ok(Self { tools: Vec::new(), choice, parallel });
        }
        check_model(&tools, model)?;
        Ok(Self { tools, choice, parallel })
    }

    /// Whether the answer must be calls.
    pub(super) fn must_call(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// What the answer must be: calls, if it must call; calls or `form`, if it may; text in which every call is held to its schema, if
    /// that is wanted of one.
    pub(super) fn grammar(
        &self,
        format: ToolFormat,
        form: Option<GrammarSource>,
        model: &ServedModel,
    ) -> Result<Option<GrammarSource>> {
        let (tools, tokenizer) = (&self.tools, &model.tokenizer);
        Ok(match (&self.choice, form) {
            (ToolChoice::None, form) => form,
            (ToolChoice::Auto, Some(form)) => {
                let either = format.grammar_or_form(tools, self.parallel, form, tokenizer);
                let text = || {
                    format!(
                        "`tools` and a form of the answer (`response_format`, `text.format`, `structured_outputs`) exclude each other with \
                         `tool_choice` auto where calls are bare JSON ({}); leave one out, or set `tool_choice` to required or none",
                        format.name()
                    )
                };
                Some(either.ok_or_else(|| Error::field("tools", text()))?)
            }
            (ToolChoice::Auto, None) => {
                tools.iter().any(is_strict).then(|| format.free_grammar(tools, self.parallel, tokenizer))
            }
            (ToolChoice::Required, _) => Some(format.grammar(tools, self.parallel, tokenizer)),
            (ToolChoice::Named(name), _) => {
                let tool = tools.iter().filter(|tool| tool.name == *name).cloned().collect::<Vec<_>>();
                Some(format.grammar(&tool, false, tokenizer))
            }
        })
    }
}

fn is_strict(tool: &Tool) -> bool {
    tool.definition["function"]["strict"] == true
}

fn check_model(tools: &[Tool], model: &ServedModel) -> Result<()> {
    if tools.is_empty() {
        return Ok(());
    }
    if !model.chat.has_tools() {
        let text = "the chat template of this model knows no tools; leave `tools` out, set `tool_choice` to none, or serve the \
                    model with a chat_template.jinja that shows them";
        return Err(Error::field("tools", text));
    }
    if model.chat.tool_format().is_none() {
        let names = ToolFormat::all_names().join(", ");
        let text = format!(
            "how this model writes calls cannot be told from its chat template; leave `tools` out, or start the server with \
             --tool-call-parser, one of {names}"
        );
        return Err(Error::field("tools", text));
    }
    Ok(())
}

fn take_tools(value: Value, shape: ToolShape) -> Result<Vec<Tool>> {
    let items = match value {
        Value::Array(items) if items.len() <= MAX_TOOLS => items,
        other => return Err(wrong("tools", &format!("a list of at most {MAX_TOOLS} tools"), &other)),
    };
    let bytes: usize = items.iter().map(|item| item.to_string().len()).sum();
    if bytes > MAX_TOOLS_BYTES {
        return Err(Error::field("tools", format!("`tools`: expected at most {MAX_TOOLS_BYTES} bytes, found {bytes}")));
    }
    let mut tools: Vec<Tool> = Vec::new();
    for (i, item) in items.into_iter().enumerate() {
        let path = format!("tools[{i}]");
        let tool = tool(&path, item, shape)?;
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(Error::field(&path, format!("`{path}`: there is another tool of the name {:?}", tool.name)));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(path: &str, value: Value, shape: ToolShape) -> Result<Tool> {
    let Value::Object(map) = value else { return Err(wrong(path, "an object with `type`: function", &value)) };
    let mut fields = Fields::new(map);
    match fields.take("type") {
        Some(kind) if kind == "function" => {}
        other => {
            return Err(wrong(
                &format!("{path}.type"),
                "function, the only kind of tool here",
                &other.unwrap_or_default(),
            ));
        }
    }
    match shape {
        ToolShape::Flat => function(fields).map_err(|error| inside(path, error)),
        ToolShape::Nested => {
            let path_of_function = format!("{path}.function");
            let function_of = |fields: &mut Fields| fields.object("function").map_err(|error| inside(path, error));
            let map = function_of(&mut fields)?
                .ok_or_else(|| Error::field(&path_of_function, format!("`{path_of_function}` is missing")))?;
            fields.finish(&[]).map_err(|error| inside(path, error))?;
            function(Fields::new(map)).map_err(|error| inside(&path_of_function, error))
        }
    }
}

fn function(mut fields: Fields) -> Result<Tool> {
    let name = fields.text("name")?.ok_or_else(|| Error::field("name", "`name` is missing"))?;
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !(1..=MAX_TOOL_NAME_BYTES).contains(&name.len()) || !name.chars().all(is_word) {
        let expected = format!("1 to {MAX_TOOL_NAME_BYTES} letters, digits, `_` and `-`");
        return Err(wrong("name", &expected, &Value::String(name)));
    }
    let description = fields.text("description")?;
    let parameters = fields.object("parameters")?;
    let strict = fields.boolean("strict")?;
    fields.finish(&[])?;
    let mut definition = Map::new();
    definition.insert("name".into(), name.as_str().into());
    definition.extend(description.map(|text| ("description".into(), text.into())));
    definition.extend(parameters.clone().map(|schema| ("parameters".into(), schema.into())));
    definition.extend(strict.map(|strict| ("strict".into(), strict.into())));
    // Without parameters there are none.
    let parameters = parameters.unwrap_or_else(|| {
        let none = [("type", json!("object")), ("properties", json!({})), ("additionalProperties", json!(false))];
        none.map(|(key, value)| (key.to_owned(), value)).into_iter().collect()
    });
    Ok(Tool { name, parameters, definition: json!({"type": "function", "function": definition}) })
}

fn take_choice(value: Option<Value>, tools: &[Tool], shape: ToolShape) -> Result<ToolChoice> {
    let expected = match shape {
        ToolShape::Nested => "none, auto, required or {\"type\": \"function\", \"function\": {\"name\": ...}}",
        ToolShape::Flat => "none, auto, required or {\"type\": \"function\", \"name\": ...}",
    };
    let Some(value) = value else {
        return Ok(if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto });
    };
    let function = if shape == ToolShape::Nested { &value["function"] } else { &value };
    let choice = match (value.as_str(), function["name"].as_str()) {
        (Some("none"), _) => return Ok(ToolChoice::None),
        (Some("auto"), _) if tools.is_empty() => return Ok(ToolChoice::None),
        (Some("auto"), _) => return Ok(ToolChoice::Auto),
        (Some("required"), _) => ToolChoice::Required,
        (None, Some(name)) if value["type"] == "function" => ToolChoice::Named(name.to_owned()),
        _ => return Err(wrong("tool_choice", expected, &value)),
    };
    if tools.is_empty() {
        return Err(Error::field("tool_choice", "`tool_choice` needs `tools` to choose from"));
    }
    if let ToolChoice::Named(name) = &choice
        && !tools.iter().any(|tool| tool.name == *name)
    {
        return Err(Error::field("tool_choice", format!("`tool_choice`: there is no tool `{name:.80}` in `tools`")));
    }
    Ok(choice)
}
