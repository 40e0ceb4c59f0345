//! [`Grammars`]: what a continuation may say, as JSON schema, regular expression, choice or grammar, made into sets of tokens by
//! llguidance.

use super::tokenizer::TextTokenizer;
use crate::engine::{Grammar, GrammarState};
use crate::{Error, Result};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::Arc;

/// Of the thread that compiles a grammar. The parser goes down into rules, references and nested expressions without a limit of its
/// own: as deep as a source of the longest that a request may have (`MAX_TOOLS_BYTES`) goes, and twice that. Pages that are not
/// touched take no memory.
const COMPILER_STACK_BYTES: usize = 512 << 20;
/// Of the parser's own words about what is wrong with a grammar, which may repeat all of it.
const MAX_REASON_CHARS: usize = 500;

/// What a continuation may say.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSource {
    /// Any JSON object, on one line.
    JsonObject,
    /// JSON of a schema, on one line; references to other documents are not followed.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole, without look-around and back-references.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A context-free grammar in llguidance's variant of Lark.
    Lark(String),
    /// A grammar that refers to another one.
    Either {
        /// It, which calls the other `@form`.
        lark: String,
        /// The other one.
        form: Box<GrammarSource>,
    },
}

impl GrammarSource {
    /// In the words of llguidance.
    fn grammar(&self) -> TopLevelGrammar {
        match self {
            Self::JsonObject => TopLevelGrammar::from_json_schema(on_one_line(json!({"type": "object"}))),
            Self::JsonSchema(schema) => TopLevelGrammar::from_json_schema(on_one_line(schema.clone())),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(texts) => {
                // A JSON string is a string of Lark too.
                let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
            Self::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
            Self::Either { lark, form } => {
                let mut all = TopLevelGrammar::from_lark(lark.clone());
                let mut others = form.grammar().grammars;
                if let Some(form) = others.first_mut() {
                    form.name = Some("form".to_owned());
                }
                all.grammars.extend(others);
                all
            }
        }
    }
}

/// Makes grammars for one tokenizer.
pub struct Grammars {
    factory: ParserFactory,
    ends: Ends,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// The end of a text: a token of its own to the parser, one of several to the model.
#[derive(Debug, Clone)]
struct Ends {
    virtual_id: u32,
    token_ids: Arc<[u32]>,
}

impl Grammars {
    /// For a tokenizer whose texts end with any of `eos_token_ids`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the parser cannot work with its tokens.
    pub fn new(tokenizer: &TextTokenizer, eos_token_ids: &[u32]) -> Result<Self> {
        let num_tokens = tokenizer.num_tokens() as u32;
        // The byte that special tokens begin with, which grammars name by id; no text has it.
        let spelled = |id: u32| match tokenizer.bytes(id) {
            _ if tokenizer.is_special(id) => [&[TokTrie::SPECIAL_TOKEN_MARKER], tokenizer.shown_bytes(id)].concat(),
            [TokTrie::SPECIAL_TOKEN_MARKER, ..] => Vec::new(),
            bytes => bytes.to_vec(),
        };
        let end = [&[TokTrie::SPECIAL_TOKEN_MARKER], &b"<end>"[..]].concat();
        let words: Vec<Vec<u8>> = (0..num_tokens).map(spelled).chain([end]).collect();
        let trie = TokTrie::from(&TokRxInfo::new(num_tokens + 1, num_tokens), &words);
        let mut factory = ParserFactory::new_simple(&(Arc::new(ApproximateTokEnv::new(trie)) as _))
            .map_err(|e| Error::Tokenizer(format!("{e:#}")))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, ends: Ends { virtual_id: num_tokens, token_ids: eos_token_ids.into() } })
    }

    /// A grammar to give to jobs.
    ///
    /// # Errors
    /// [`Error::Grammar`] if it is none, is too large, or uses what is not supported.
    pub fn compile(&self, source: &GrammarSource) -> Result<Arc<dyn Grammar>> {
        let compile = || {
            let parser = self.factory.create_parser(source.grammar()).map_err(refused)?;
            let begin = Walk::begin(Matcher::new(Ok(parser)), self.ends.clone());
            // What cannot even begin is refused now.
            begin.allowed()?;
            Ok(Arc::new(Compiled { begin }) as Arc<dyn Grammar>)
        };
        std::thread::scope(|scope| {
            let compiler = std::thread::Builder::new().name("moe-grammar".into()).stack_size(COMPILER_STACK_BYTES);
            let compiler = compiler.spawn_scoped(scope, compile);
            let compiler = compiler.map_err(|reason| Error::Io { path: "moe-grammar thread".into(), reason })?;
            compiler.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Why the parser refuses, shortened.
fn refused(error: anyhow::Error) -> Error {
    let reason = format!("{error:#}");
    match reason.char_indices().nth(MAX_REASON_CHARS) {
        Some((end, _)) => Error::Grammar(format!("{}...", &reason[..end])),
        None => Error::Grammar(reason),
    }
}

/// A schema whose values have at most one space after a comma or a colon: of free white space a small model would never come to an end.
pub(super) fn on_one_line(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        let spacing = json!({"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": false});
        fields.insert("x-guidance".into(), spacing);
    }
    schema
}

/// A grammar before its first token, the tokens that may come first known.
struct Compiled {
    begin: Walk,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl Grammar for Compiled {
    fn start(&self) -> Box<dyn GrammarState> {
        let Walk { matcher, ends, next } = &self.begin;
        Box::new(Walk { matcher: matcher.deep_clone(), ends: ends.clone(), next: next.clone() })
    }
}

/// One continuation's way through a grammar.
struct Walk {
    matcher: Matcher,
    ends: Ends,
    /// The tokens that may come next; an error if the parser gave up.
    next: std::result::Result<SimpleVob, String>,
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walk").finish_non_exhaustive()
    }
}

impl Walk {
    fn begin(mut matcher: Matcher, ends: Ends) -> Self {
        let next = matcher.compute_mask_or_eos().map_err(|e| format!("{e:#}"));
        Self { matcher, ends, next }
    }

    fn may_end(&self) -> bool {
        self.next.as_ref().is_ok_and(|next| next.is_allowed(self.ends.virtual_id))
    }
}

impl GrammarState for Walk {
    fn allowed(&self) -> Result<Vec<u32>> {
        let next = self.next.as_ref().map_err(|text| Error::Grammar(text.clone()))?;
        let mut words = next.as_slice().to_vec();
        let mut set = |id: u32, value: bool| {
            let word = &mut words[id as usize / 32];
            *word = *word & !(1 << (id % 32)) | u32::from(value) << (id % 32);
        };
        set(self.ends.virtual_id, false);
        self.ends.token_ids.iter().for_each(|&id| set(id, self.may_end()));
        Ok(words)
    }

    fn push(&mut self, token_id: u32) -> Result<()> {
        self.matcher.consume_token(token_id).map_err(refused)?;
        self.next = self.matcher.compute_mask_or_eos().map_err(|e| format!("{e:#}"));
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.may_end() && self.next.as_ref().is_ok_and(|next| next.num_set() == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::tokenizer;

    fn grammars() -> (Grammars, TextTokenizer) {
        let tokenizer = tokenizer(&[]);
        (Grammars::new(&tokenizer, &[0]).expect("works"), tokenizer)
    }

    /// How far a text goes, and whether it may end there, and whether it must.
    #[track_caller]
    fn walk(source: &GrammarSource, text: &str) -> (usize, bool, bool) {
        let (grammars, tokenizer) = grammars();
        let mut state = grammars.compile(source).expect("compiles").start();
        let is_allowed = |state: &dyn GrammarState, id: u32| {
            state.allowed().expect("goes on")[id as usize / 32] >> (id % 32) & 1 == 1
        };
        let mut taken = 0;
        for id in tokenizer.encode(text).expect("encodes") {
            if !is_allowed(state.as_ref(), id) {
                break;
            }
            state.push(id).expect("allowed");
            taken += 1;
        }
        (taken, is_allowed(state.as_ref(), 0), state.is_complete())
    }

    #[test]
    fn each_kind_of_source() {
        let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
            "additionalProperties": false});
        for (source, text, want) in [
            (GrammarSource::Regex("[ab]{2}c?".into()), "ab", (2, true, false)),
            (GrammarSource::Regex("[ab]{2}c?".into()), "abc", (3, true, true)),
            (GrammarSource::Regex("[ab]{2}c?".into()), "axb", (1, false, false)),
            (GrammarSource::Choice(vec!["yes".into(), "no \"x\"".into()]), "no \"x\"", (6, true, true)),
            (GrammarSource::Choice(vec!["yes".into(), "no".into()]), "ye", (2, false, false)),
            (GrammarSource::JsonSchema(schema.clone()), "{\"n\": 12}", (9, true, true)),
            (GrammarSource::JsonSchema(schema.clone()), "{\"n\": x", (6, false, false)),
            (GrammarSource::JsonSchema(schema), "{\"m\"", (2, false, false)),
            (GrammarSource::JsonObject, "{\"any\": [1, {}]}", (16, true, true)),
            (GrammarSource::JsonObject, "{\"any\":[1,{}]}", (14, true, true)),
            (GrammarSource::JsonObject, "{\n", (1, false, false)),
            (GrammarSource::JsonObject, "[", (0, false, false)),
            (GrammarSource::Lark("start: \"a\"+ \"b\"".into()), "aab", (3, true, true)),
        ] {
            assert_eq!(walk(&source, text), want, "{source:?} on {text}");
        }
    }

    #[test]
    fn deep_sources_compile_or_are_refused() {
        let (grammars, _) = grammars();
        let chain = |n: usize, name: &str| {
            let rules: Vec<String> = (0..n).map(|i| format!("{name}{i}: {name}{}\n", i + 1)).collect();
            format!("start: {name}0\n{}{name}{n}: \"a\"\n", rules.concat())
        };
        let references = |n: usize, wrapped: bool| {
            let to = |i: usize| {
                let next = json!({"$ref": format!("#/$defs/a{}", i + 1)});
                if wrapped { json!({"anyOf": [next, {"type": "null"}]}) } else { next }
            };
            let mut definitions: serde_json::Map<String, Value> = (0..n).map(|i| (format!("a{i}"), to(i))).collect();
            definitions.insert(format!("a{n}"), json!({"type": "integer"}));
            json!({"$ref": "#/$defs/a0", "$defs": definitions})
        };
        for (name, source) in [
            ("rules", GrammarSource::Lark(chain(4000, "b"))),
            ("terminals", GrammarSource::Lark(chain(4000, "B"))),
            ("braces", GrammarSource::Lark(format!("start: {}", "a{".repeat(32_000)))),
            ("negations", GrammarSource::Lark(format!("start: /a/ %if {}", "not(".repeat(12_000)))),
            ("references", GrammarSource::JsonSchema(references(1800, false))),
            ("references to either", GrammarSource::JsonSchema(references(900, true))),
        ] {
            match grammars.compile(&source) {
                Ok(grammar) => {
                    let mut state = grammar.start();
                    let allowed = state.allowed().expect("begins");
                    let id = (0..257).find(|id| allowed[id / 32] >> (id % 32) & 1 == 1).expect("something may come");
                    state.push(id as u32).expect("allowed");
                }
                Err(Error::Grammar(text)) => assert!(text.len() < 600, "{name}: {} bytes", text.len()),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }

    #[test]
    fn impossible_sources_are_errors() {
        let (grammars, _) = grammars();
        for source in [
            GrammarSource::Regex("(".into()),
            GrammarSource::Regex("(?<=a)b".into()),
            GrammarSource::Lark("start: nothing".into()),
            GrammarSource::Lark(String::new()),
            GrammarSource::JsonSchema(json!({"type": "no such type"})),
            GrammarSource::JsonSchema(json!({"$ref": "https://example.org/schema"})),
            GrammarSource::JsonSchema(json!(3)),
        ] {
            let error = grammars.compile(&source).expect_err(&format!("{source:?}"));
            assert!(matches!(error, Error::Grammar(_)), "{source:?}: {error}");
        }
    }
}
