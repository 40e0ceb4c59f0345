//! [`ChatTemplate`]: messages to one prompt, by the model's Jinja template or the dialogue format of our training data.

use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

/// Used when `tokenizer_config.json` has no `chat_template`: the lines `A: ...` and `B: ...` of the training dialogues.
/// System messages become plain paragraphs in front. The model speaks as `B`.
const DIALOGUE: &str = "{% for message in messages %}\
{% if message.role in ['system', 'developer'] %}{{ message.content }}\n\n\
{% elif message.role == 'user' %}A: {{ message.content }}\n\
{% else %}B: {{ message.content }}\n\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}B:{% endif %}";

/// Ends an answer in the dialogue format: the other speaker's turn.
const DIALOGUE_STOP: &str = "\nA:";

const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `developer`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// Turns messages into a prompt.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    is_dialogue: bool,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The dialogue format.
    ///
    /// # Errors
    /// [`Error::Template`]; none in practice, for the template is ours.
    pub fn dialogue() -> Result<Self> {
        Self::compile(DIALOGUE, true, String::new(), String::new())
    }

    /// The template of a `tokenizer_config.json`, or the dialogue format if it has none.
    ///
    /// # Errors
    /// [`Error::ModelFile`] if the file is not JSON, [`Error::Template`] if the template is not Jinja.
    pub fn from_tokenizer_config(json: &[u8]) -> Result<Self> {
        let config: Value = serde_json::from_slice(json)
            .map_err(|e| Error::model_file("tokenizer_config.json", format!("not JSON: {e}")))?;
        match &config["chat_template"] {
            Value::Null => Self::dialogue(),
            Value::String(source) => {
                Self::compile(source, false, token_text(&config["bos_token"]), token_text(&config["eos_token"]))
            }
            other => Err(Error::model_file(
                "tokenizer_config.json",
                format!("chat_template should be a string, found {other:.60}; keep the one named `default`"),
            )),
        }
    }

    fn compile(source: &str, is_dialogue: bool, bos_token: String, eos_token: String) -> Result<Self> {
        let mut environment = Environment::new();
        // As in Hugging Face: blocks take their line with them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Template(e.to_string()))?);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_template_owned(NAME, source.to_owned()).map_err(|e| Error::Template(e.to_string()))?;
        Ok(Self { environment, is_dialogue, bos_token, eos_token })
    }

    /// The prompt that asks for the next answer.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses these messages.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        let message = |m: &ChatMessage| context! { role => &m.role, content => &m.content };
        let messages: Vec<minijinja::Value> = messages.iter().map(message).collect();
        let render = || {
            self.environment.get_template(NAME)?.render(context! {
                messages => &messages,
                add_generation_prompt => true,
                bos_token => &self.bos_token,
                eos_token => &self.eos_token,
            })
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
}

/// A special token is written as a string or as `{"content": ...}`.
fn token_text(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(list: &[(&str, &str)]) -> Vec<ChatMessage> {
        list.iter().map(|(role, content)| ChatMessage { role: (*role).into(), content: (*content).into() }).collect()
    }

    #[test]
    fn dialogue_format() {
        let list = messages(&[("system", "A talk."), ("user", "Hi.\nYou?"), ("assistant", "Fine."), ("user", "Good.")]);
        let text = ChatTemplate::dialogue().and_then(|t| t.render(&list)).expect("renders");
        assert_eq!(text, "A talk.\n\nA: Hi.\nYou?\nB: Fine.\nA: Good.\nB:");
    }

    #[test]
    fn message_text_is_not_template_text() {
        let text = ChatTemplate::dialogue().and_then(|t| t.render(&messages(&[("user", "{{ 1 + 1 }} <b>&")])));
        assert_eq!(text.expect("renders"), "A: {{ 1 + 1 }} <b>&\nB:");
    }

    #[test]
    fn a_models_own_template() {
        let config = br#"{"bos_token": {"content": "<s>"},
            "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}\n{% endfor %}"}"#;
        let template = ChatTemplate::from_tokenizer_config(config).expect("compiles");
        assert_eq!(template.render(&messages(&[("user", " x ")])).expect("renders"), "<s>[user] x\n");
        assert!(template.stop_strings().is_empty());
    }

    #[test]
    fn a_template_may_refuse() {
        let config = br#"{"chat_template": "{{ raise_exception('only one message') }}"}"#;
        let template = ChatTemplate::from_tokenizer_config(config).expect("compiles");
        assert!(template.render(&[]).expect_err("refuses").to_string().contains("only one message"));
    }

    #[test]
    fn bad_templates_are_errors() {
        assert!(ChatTemplate::from_tokenizer_config(b"{").is_err());
        assert!(ChatTemplate::from_tokenizer_config(br#"{"chat_template": "{% for %}"}"#).is_err());
        assert!(ChatTemplate::from_tokenizer_config(br#"{"chat_template": [1]}"#).is_err());
    }
}
