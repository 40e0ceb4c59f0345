//! [`ChatTemplate`]: messages to one prompt, by the model's Jinja template or the dialogue format of our training data.
//!
//! Templates see what transformers shows them: `messages`, `tools`, `add_generation_prompt`, the special tokens by name, `strftime_now`,
//! `raise_exception`, `tojson` as Python writes it, and the methods of Python's strings, lists and dictionaries.

mod clock;
mod message;
mod python;
#[cfg(test)]
mod tests;

pub use message::{ChatMessage, Tool, ToolCall};

use super::thoughts;
use super::tokenizer::TextTokenizer;
use super::tools::ToolFormat;
use crate::{Error, Result};
use message::{ArgumentsAs, ToldAs};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

/// Used where a model has no template: the lines `A: ...` and `B: ...` of the training dialogues. System messages become plain
/// paragraphs in front. The model speaks as `B`, and calls a tool by a line of `@NAME {...}`.
const DIALOGUE: &str = include_str!("dialogue.jinja");

/// Ends an answer in the dialogue format: the other speaker's turn.
const DIALOGUE_STOP: &str = "\nA:";

/// What gpt-oss' form is called.
const HARMONY: &str = "openai";

const FILE: &str = "tokenizer_config.json";
const DEFAULT: &str = "default";
/// The template for conversations with tools, where a model has one of its own for them.
const TOOL_USE: &str = "tool_use";
/// Steps of a template's machine for one prompt: the longest conversations take thousands, an endless loop all of them.
const FUEL: u64 = 50_000_000;
/// By these a template tells messages of nothing but calls from others.
const NONE_TESTS: [&str; 3] = ["content is none", "'content'] is none", "\"content\"] is none"];
/// What a template is told by its renderer, not by whoever asks.
pub(crate) const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Turns messages into a prompt.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    is_dialogue: bool,
    /// What templates ask to be told.
    variables: HashSet<String>,
    /// The text of a message that has none is null to a template that asks for that, or else empty.
    told: ToldAs,
    format: Option<ToolFormat>,
    /// Whether answers may begin with a thought in marks.
    thinks: bool,
    /// Special tokens by their names, such as `bos_token`.
    tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// The dialogue format.
    ///
    /// # Errors
    /// [`Error::Template`]; none in practice, for the template is ours.
    pub fn dialogue() -> Result<Self> {
        let mut template = Self::compile(vec![(DEFAULT.to_owned(), DIALOGUE.to_owned())], Map::new())?;
        template.is_dialogue = true;
        template.format = Some(ToolFormat::DIALOGUE);
        Ok(template)
    }

    /// The template of a model: a `chat_template.jinja`, or else what the `tokenizer_config.json` holds, one template or several with
    /// names; the dialogue format if there is none.
    ///
    /// # Errors
    /// [`Error::ModelFile`] if a file is not what it should be, [`Error::Template`] if the template is not Jinja.
    pub fn from_files(tokenizer_config: Option<&[u8]>, chat_template: Option<&[u8]>) -> Result<Self> {
        let config: Value = match tokenizer_config {
            Some(json) => {
                serde_json::from_slice(json).map_err(|e| Error::model_file(FILE, format!("not JSON: {e}")))?
            }
            None => Value::Null,
        };
        let sources = match chat_template {
            Some(bytes) => {
                let text = std::str::from_utf8(bytes)
                    .map_err(|e| Error::model_file("chat_template.jinja", format!("expected UTF-8: {e}")))?;
                vec![(DEFAULT.to_owned(), text.to_owned())]
            }
            None => named_sources(&config["chat_template"])?,
        };
        if sources.is_empty() {
            return Self::dialogue();
        }
        Self::compile(sources, special_tokens(&config))
    }

    fn compile(sources: Vec<(String, String)>, tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = environment()?;
        let mut variables = HashSet::new();
        let mut told = ToldAs { empty: "".into(), thinking: false, one_text_before_calls: false };
        let format = sources.iter().find_map(|(_, source)| ToolFormat::of_template(source));
        let thinks = sources.iter().any(|(_, source)| thoughts::are_of_template(source));
        for (name, source) in sources {
            // As Jinja2 reads files, whatever system wrote them.
            let source = without_generation_tags(&source.replace("\r\n", "\n"));
            if NONE_TESTS.iter().any(|test| source.contains(test)) {
                told.empty = Value::Null;
            }
            told.thinking |= source.contains("message.thinking");
            told.one_text_before_calls |= ToolFormat::of_template(&source) == ToolFormat::named(HARMONY);
            environment.add_template_owned(name.clone(), source).map_err(|e| Error::Template(e.to_string()))?;
            let template = environment.get_template(&name).map_err(|e| Error::Template(e.to_string()))?;
            variables.extend(template.undeclared_variables(false));
        }
        Ok(Self { environment, is_dialogue: false, variables, told, format, thinks, tokens })
    }

    /// Reads and asks for calls of tools in this form, whatever the template looks like.
    pub fn with_tool_format(self, format: ToolFormat) -> Self {
        Self { format: Some(format), ..self }
    }

    /// The form of calls in an answer, as far as it is known.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.format
    }

    /// Whether an answer may begin with a thought, `<think>...</think>`.
    pub fn thinks(&self) -> bool {
        self.thinks
    }

    /// Whether an answer to this prompt of the template begins inside a thought.
    pub fn opens_thought(&self, prompt: &str) -> bool {
        self.thinks && thoughts::is_open_after(prompt)
    }

    /// Whether an answer to this prompt of the template may begin with a thought: not after one that is over.
    pub fn may_think(&self, prompt: &str) -> bool {
        self.thinks && !thoughts::is_closed_after(prompt.as_bytes())
    }

    /// Special tokens that say where thoughts are.
    pub fn thought_markers(&self, tokenizer: &TextTokenizer) -> Vec<u32> {
        let ids = thoughts::MARKERS.iter().filter_map(|name| tokenizer.special_id(name));
        if self.thinks { ids.collect() } else { Vec::new() }
    }

    /// Whether the template can show tools to the model.
    pub fn has_tools(&self) -> bool {
        self.has_variable("tools")
    }

    /// Whether the template asks for a variable of this name that is not one of the model's special tokens.
    pub fn has_variable(&self, name: &str) -> bool {
        self.variables.contains(name) && !self.tokens.contains_key(name)
    }

    /// The prompt that asks for the next answer.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses these messages.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        self.render_with(messages, &[], &Map::new())
    }

    /// The same with tools that the model may call, and with variables that templates of their own know, such as `enable_thinking`.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_with(
        &self,
        messages: &[ChatMessage],
        tools: &[Tool],
        variables: &Map<String, Value>,
    ) -> Result<String> {
        let rendered = self.render_either(messages, tools, variables);
        // Templates that name the roles they know leave out what others say: it is the system's then, as it was before there were
        // developers.
        if let Ok(prompt) = &rendered
            && messages.iter().any(|message| message.is_lost_in(prompt))
        {
            let mut messages = messages.to_vec();
            messages.iter_mut().filter(|m| m.role == "developer").for_each(|m| m.role = "system".to_owned());
            return self.render_either(&messages, tools, variables);
        }
        rendered
    }

    fn render_either(
        &self,
        messages: &[ChatMessage],
        tools: &[Tool],
        variables: &Map<String, Value>,
    ) -> Result<String> {
        let rendered = self.render_as(messages, tools, variables, ArgumentsAs::Object);
        if rendered.is_err() && messages.iter().any(|message| !message.tool_calls.is_empty()) {
            // Some templates append arguments to text, which objects cannot be.
            return self.render_as(messages, tools, variables, ArgumentsAs::Text).or(rendered);
        }
        rendered
    }

    fn render_as(
        &self,
        messages: &[ChatMessage],
        tools: &[Tool],
        variables: &Map<String, Value>,
        arguments: ArgumentsAs,
    ) -> Result<String> {
        let mut context = variables.clone();
        context.extend(self.tokens.clone());
        let definitions: Vec<Value> = tools.iter().map(|tool| tool.definition.clone()).collect();
        context.insert("messages".into(), messages.iter().map(|m| m.to_json(arguments, &self.told)).collect());
        context.insert("tools".into(), if tools.is_empty() { Value::Null } else { definitions.into() });
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), true.into());
        let with_tools = !tools.is_empty() && self.environment.get_template(TOOL_USE).is_ok();
        let render = || {
            let template = self.environment.get_template(if with_tools { TOOL_USE } else { DEFAULT })?;
            template.render(Jinja::from(Serde(&context)))
        };
        render().map_err(|e| Error::Template(e.to_string()))
    }

    /// Strings that end an answer beside the client's.
    pub fn stop_strings(&self) -> Vec<String> {
        if self.is_dialogue { vec![DIALOGUE_STOP.to_owned()] } else { Vec::new() }
    }

    /// Whether an answer begins with a space that belongs to the format, not to the answer.
    pub fn trims_start(&self) -> bool {
        self.is_dialogue
    }

    /// Whether its prompts begin and end as they are to: a model's own template says all special tokens itself.
    pub fn says_special_tokens(&self) -> bool {
        !self.is_dialogue
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    // Blocks take their line with them.
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| Error::Template(e.to_string()))?);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(python::print);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python::tojson);
    // Jinja2's: nothing is none of these, text and objects are both.
    environment.add_test("iterable", |value: Jinja| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("sequence", |value: Jinja| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Number | ValueKind::Bool)
    });
    environment.add_filter("string", |value: Jinja| python::to_str(&value));
    let refused = |message: String| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    environment
        .add_function("raise_exception", move |message: String| -> std::result::Result<String, minijinja::Error> {
            Err(refused(message))
        });
    environment.add_function("strftime_now", move |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        clock::strftime(&format, now).map_err(|error| refused(format!("strftime_now: {error}")))
    });
    Ok(environment)
}

/// One template, or several of which `default` must be one; others than `tool_use` are never asked for.
fn named_sources(value: &Value) -> Result<Vec<(String, String)>> {
    let refused = |found: &Value| {
        let text = format!(
            "chat_template should be a string, or a list of templates one of which is named `default`, found {found:.60}"
        );
        Error::model_file(FILE, text)
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![(DEFAULT.to_owned(), source.clone())]),
        Value::Array(items) => {
            let named = |name: &str| {
                let item = items.iter().find(|item| item["name"] == name)?;
                Some((name.to_owned(), item["template"].as_str()?.to_owned()))
            };
            let default = named(DEFAULT).ok_or_else(|| refused(value))?;
            Ok(std::iter::once(default).chain(named(TOOL_USE)).collect())
        }
        other => Err(refused(other)),
    }
}

/// `bos_token` and its like, each written as a string or as `{"content": ...}`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned();
    let fields =
        config.as_object().into_iter().flatten().filter(|(key, value)| key.ends_with("_token") && !value.is_boolean());
    let mut tokens: Map<String, Value> =
        ["bos_token", "eos_token"].map(|key| (key.to_owned(), "".into())).into_iter().collect();
    tokens.extend(fields.map(|(key, value)| (key.clone(), text(value).into())));
    tokens
}

/// `{% generation %}` marks what an assistant said, for training; here it is a block like any other.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        let Some(end) = tag[2..].find("%}").map(|at| at + 2) else { break };
        let inner = &tag[2..end];
        let word = inner.trim_matches(['-', '+']).trim();
        out.push_str(before);
        match word {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replace("generation", "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", inner.replace("endgeneration", "endif"))),
            _ => out.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    out + rest
}
