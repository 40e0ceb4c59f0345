//! Tokenises documents and packs them into a stream of tokens, batch by batch. Holds a batch, never a source.

use super::documents::Documents;
use super::packed::PackedSource;
use super::pieces::Piece;
use super::text_source::TextSource;
use super::token_file::{Key, TokenFile, TokenWriter, VERSION};
use crate::hf::Bytes;
use crate::train::tokenizer::to_json;
use crate::{Error, Result};
use rayon::prelude::*;
use std::io::{Cursor, Seek, Write};
use std::path::Path;
use tokenizers::Tokenizer;

/// Tokenises with one tokenizer and one end-of-document id.
#[derive(Debug)]
pub struct Packer {
    tokenizer: Tokenizer,
    eos_id: u32,
    vocab_size: usize,
    /// Hash of all that the ids of a text depend on besides the text.
    identity: blake3::Hash,
}

/// Text tokenised at once; bounds the memory of the encodings.
const BATCH_BYTES: usize = 4 << 20;
/// Memory a piece costs besides its text: what bounds a batch of very short documents.
const PIECE_OVERHEAD_BYTES: usize = 64;

impl Packer {
    /// A packer whose ids lie below `vocab_size`. Special tokens spelled out in the text are read as ordinary text, so
    /// no document can forge an end-of-document token. What a `tokenizer.json` says of truncation and padding is for other uses and
    /// is left out.
    ///
    /// # Errors
    /// [`Error::Config`] if `eos_id` is outside the vocabulary; [`Error::Tokenizer`] if the tokenizer cannot be written as
    /// JSON.
    pub fn new(tokenizer: &Tokenizer, eos_id: u32, vocab_size: usize) -> Result<Self> {
        if eos_id as usize >= vocab_size {
            return Err(Error::Config(format!(
                "the end-of-document id {eos_id} is outside the model's vocabulary of {vocab_size}"
            )));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&VERSION.to_le_bytes()).update(&eos_id.to_le_bytes()).update(&(vocab_size as u64).to_le_bytes());
        let mut tokenizer = tokenizer.clone();
        tokenizer.with_padding(None).with_truncation(None).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let identity = hasher.update(to_json(&tokenizer)?.as_bytes()).finalize();
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { tokenizer, eos_id, vocab_size, identity })
    }

    /// Hash of all that the tokens of `source` depend on: its content, how that is read, the tokenizer, the vocabulary and
    /// the version of the file. Neither its name nor its place.
    pub(crate) fn key(&self, source: &TextSource) -> Key {
        let format = source.format();
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.identity.as_bytes()).update(source.hash().as_bytes());
        hasher.update(&[u8::from(format.jsonl), u8::from(format.xz)]).finalize()
    }

    /// Tokenises `documents` and packs them, in order, in memory.
    ///
    /// Bytes per token are exact in sum for any tokenizer that reports offsets: a token is credited with the bytes by
    /// which it moves the furthest offset of its piece forward, the last token of a piece also with whatever remains,
    /// and the end-of-document token with 0. A character split over several tokens is credited to the first of them.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a document cannot be encoded or gives an id outside the vocabulary.
    pub fn pack(&self, documents: &Documents) -> Result<PackedSource> {
        let pieces = documents.pieces().map(Ok);
        let file = self.pack_in_memory(Path::new(&documents.name), self.identity, pieces, &mut || ())?;
        Ok(PackedSource::new(documents.name.clone(), documents.weight, file))
    }

    /// The tokens of `pieces` as a file that is held in memory; messages call it `path`.
    ///
    /// # Errors
    /// As [`Packer::append`].
    pub(crate) fn pack_in_memory<S: AsRef<str> + Sync>(
        &self,
        path: &Path,
        key: Key,
        pieces: impl Iterator<Item = Result<Piece<S>>>,
        progress: &mut dyn FnMut(),
    ) -> Result<TokenFile> {
        let mut writer = self.writer(Cursor::new(Vec::new()), path, key)?;
        self.append(pieces, &mut writer, progress)?;
        let bytes = Bytes::Held(writer.finish()?.into_inner().into());
        TokenFile::check(bytes, &key, &mut |_, _| ()).map_err(|reason| Error::format(path, reason))
    }

    /// A writer of tokens to `out`, which is empty and called `path`.
    ///
    /// # Errors
    /// As [`TokenWriter::new`].
    pub(crate) fn writer<W: Write + Seek>(&self, out: W, path: &Path, key: Key) -> Result<TokenWriter<W>> {
        TokenWriter::new(out, path.to_owned(), key, self.vocab_size)
    }

    /// Tokenises `pieces` as [`Packer::pack`] does and appends their tokens to `tokens`, telling `progress` after every
    /// batch. Stops at the first error among the pieces.
    ///
    /// # Errors
    /// As [`Packer::pack`]; what `pieces` yield; [`Error::Io`] if the tokens cannot be written.
    pub(crate) fn append<S: AsRef<str> + Sync>(
        &self,
        pieces: impl Iterator<Item = Result<Piece<S>>>,
        tokens: &mut TokenWriter<impl Write + Seek>,
        progress: &mut dyn FnMut(),
    ) -> Result<()> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for piece in pieces {
            let piece = piece?;
            bytes += piece.text.as_ref().len() + PIECE_OVERHEAD_BYTES;
            batch.push(piece);
            if bytes >= BATCH_BYTES {
                self.append_batch(&batch, tokens)?;
                (batch, bytes) = (Vec::new(), 0);
                progress();
            }
        }
        self.append_batch(&batch, tokens)?;
        progress();
        Ok(())
    }

    fn append_batch<S: AsRef<str> + Sync>(
        &self,
        batch: &[Piece<S>],
        tokens: &mut TokenWriter<impl Write + Seek>,
    ) -> Result<()> {
        let encoded: Vec<Vec<(u32, u16)>> =
            batch.par_iter().map(|piece| self.encode(piece.text.as_ref())).collect::<Result<_>>()?;
        for (ids, piece) in encoded.into_iter().zip(batch) {
            for (id, bytes) in ids.into_iter().chain(piece.ends_document.then_some((self.eos_id, 0))) {
                tokens.push(id, bytes)?;
            }
        }
        Ok(())
    }

    /// Ids of one piece with the bytes each stands for.
    fn encode(&self, piece: &str) -> Result<Vec<(u32, u16)>> {
        let encoding = self.tokenizer.encode(piece, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let mut reached = 0;
        let mut tokens = Vec::with_capacity(encoding.len());
        for (&id, &(_, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if id as usize >= self.vocab_size {
                let size = self.vocab_size;
                return Err(Error::Tokenizer(format!("gave id {id}, outside the model's vocabulary of {size}")));
            }
            let end = end.max(reached);
            tokens.push((id, narrow_bytes(end - reached)?));
            reached = end;
        }
        if let Some((_, bytes)) = tokens.last_mut() {
            *bytes = narrow_bytes(usize::from(*bytes) + piece.len() - reached)?;
        }
        Ok(tokens)
    }
}

fn narrow_bytes(bytes: usize) -> Result<u16> {
    u16::try_from(bytes).map_err(|_| {
        Error::Tokenizer(format!("one token stands for {bytes} bytes of text, expected at most {}", u16::MAX))
    })
}
