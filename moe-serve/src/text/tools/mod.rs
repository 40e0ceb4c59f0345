//! Calls of tools in the text of an answer: how each family of models writes them, found as the text grows ([`AnswerParser`]) and
//! asked for by a grammar ([`ToolFormat::grammar`]) or held to one where they come ([`ToolFormat::free_grammar`]).
//!
//! One file per family. A family is known by what its chat template says, or by the name that vLLM's `--tool-call-parser` has for it.

mod call_reader;
mod deepseek;
mod dialogue;
mod either;
mod form;
mod free;
mod glm;
mod granite;
mod harmony;
mod hermes;
mod llama;
mod marked;
mod mistral;
mod pending;
#[cfg(test)]
mod tests;

use super::chat::Tool;
use super::grammar::GrammarSource;
use super::tokenizer::TextTokenizer;
use either::EitherParser;
use form::{Before, Form};
use pending::Pending;
use std::fmt::Debug;

/// What a piece of an answer turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerPart {
    /// For the reader.
    Text(String),
    /// What the model thought before, where its form keeps that apart.
    Reasoning(String),
    /// The name of a tool: a call begins.
    Call(String),
    /// More of the last call's arguments, JSON as the model writes it.
    Arguments(String),
}

/// Reads one answer as it grows. What looked like a call and is none comes out as text.
pub trait AnswerParser: Debug + Send {
    /// What is certain after more text.
    fn push(&mut self, text: &str) -> Vec<AnswerPart>;
    /// What is left when no more text comes.
    fn finish(&mut self) -> Vec<AnswerPart>;
    /// Whether more text would be a thought.
    fn thinks(&self) -> bool {
        false
    }
}

/// A reader that goes through what has come step by step.
trait Stepwise: Debug + Send {
    /// What has come and is not read yet.
    fn pending(&mut self) -> &mut Pending;
    /// One step; false if more text is needed, of which none comes if `last`.
    fn advance(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool;
    /// What is left after the last step.
    fn end(&mut self, _out: &mut Vec<AnswerPart>) {}
    /// As [`AnswerParser::thinks`].
    fn in_thought(&self) -> bool {
        false
    }
}

impl<P: Stepwise> AnswerParser for P {
    fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        let mut out = Vec::new();
        self.pending().push(text);
        while self.advance(false, &mut out) {}
        out
    }

    fn finish(&mut self) -> Vec<AnswerPart> {
        let mut out = Vec::new();
        while self.advance(true, &mut out) {}
        self.end(&mut out);
        out
    }

    fn thinks(&self) -> bool {
        self.in_thought()
    }
}

/// One family's way to write calls.
trait Family: Sync {
    /// What users call it; the first is its name.
    fn names(&self) -> &'static [&'static str];
    /// Whether a chat template is this family's.
    fn wrote(&self, template: &str) -> bool;
    /// How a call is written.
    fn form(&self) -> &'static Form;
    /// A reader of one answer to a request with `tools`.
    fn parser(&self, tools: &[Tool]) -> Box<dyn AnswerParser>;
}

/// In the order in which templates are asked: the first ones have the clearer marks.
const FAMILIES: [&dyn Family; 9] = [
    &harmony::Harmony,
    &deepseek::DeepSeekV3,
    &deepseek::DeepSeekV31,
    &glm::Glm,
    &mistral::Mistral,
    &granite::Granite,
    &hermes::Hermes,
    &llama::Llama,
    &dialogue::Dialogue,
];

/// How a model writes calls of tools.
#[derive(Clone, Copy)]
pub struct ToolFormat(&'static dyn Family);

impl Debug for ToolFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ToolFormat").field(&self.name()).finish()
    }
}

impl PartialEq for ToolFormat {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for ToolFormat {}

impl ToolFormat {
    /// That of the models trained here.
    pub const DIALOGUE: Self = Self(&dialogue::Dialogue);

    /// The one of this name, as vLLM names it.
    pub fn named(name: &str) -> Option<Self> {
        FAMILIES.into_iter().find(|family| family.names().contains(&name)).map(Self)
    }

    /// All names that [`ToolFormat::named`] knows.
    pub fn all_names() -> Vec<&'static str> {
        FAMILIES.into_iter().flat_map(|family| family.names()).copied().collect()
    }

    /// The one that a chat template's marks belong to.
    pub(super) fn of_template(template: &str) -> Option<Self> {
        FAMILIES.into_iter().find(|family| family.wrote(template)).map(Self)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.0.names()[0]
    }

    /// A reader of one answer to a request with `tools`.
    pub fn parser(self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        self.0.parser(tools)
    }

    /// A reader of one answer of [`ToolFormat::grammar_or_form`]: what does not begin as a call does is text to its end.
    pub fn parser_or_form(self, tools: &[Tool]) -> Box<dyn AnswerParser> {
        let form = self.0.form();
        let beginnings = tools.iter().map(|tool| form.begin.to_owned() + &form.head(tool)).collect();
        Box::new(EitherParser::new(beginnings, self.0.parser(tools)))
    }

    /// Whether answers need the reader also where no tools were given.
    pub fn always_reads(self) -> bool {
        self.0.form().always_reads
    }

    /// Special tokens that the reader must see in the text.
    pub fn markers(self, tokenizer: &TextTokenizer) -> Vec<u32> {
        self.0.form().markers.iter().filter_map(|name| tokenizer.special_id(name)).collect()
    }

    /// An id for a call, of 64 random bits.
    pub fn call_id(self, bits: u64) -> String {
        self.0.form().call_id(bits)
    }

    /// An answer of nothing but calls: one, or up to [`MAX_CALLS`] if `parallel` and the family knows several.
    pub fn grammar(self, tools: &[Tool], parallel: bool, tokenizer: &TextTokenizer) -> GrammarSource {
        GrammarSource::Lark(self.0.form().grammar(tools, self.count(parallel), |name| tokenizer.special_id(name)))
    }

    /// An answer of such calls, or of a form of its own; none where calls are JSON that could begin any form.
    pub fn grammar_or_form(
        self,
        tools: &[Tool],
        parallel: bool,
        form: GrammarSource,
        tokenizer: &TextTokenizer,
    ) -> Option<GrammarSource> {
        let family = self.0.form();
        let lark = family.grammar_or_form(tools, self.count(parallel), |name| tokenizer.special_id(name));
        (!matches!(family.before, Before::Nothing(_))).then(|| GrammarSource::Either { lark, form: Box::new(form) })
    }

    /// An answer of text, such calls, or text and then calls.
    pub fn free_grammar(self, tools: &[Tool], parallel: bool, tokenizer: &TextTokenizer) -> GrammarSource {
        GrammarSource::Lark(self.0.form().free_grammar(tools, self.count(parallel), |name| tokenizer.special_id(name)))
    }

    fn count(self, parallel: bool) -> usize {
        if parallel && self.0.form().parallel { MAX_CALLS } else { 1 }
    }
}

/// Calls that an answer held to calls may make.
pub const MAX_CALLS: usize = 8;

/// The names of tools.
fn names_of(tools: &[Tool]) -> Vec<String> {
    tools.iter().map(|tool| tool.name.clone()).collect()
}
