//! Reads a source into documents: plain text or JSONL, either of them xz-compressed. Knows nothing of tokens.

use super::source::{Origin, SourceSpec};
use crate::{Error, Result};
use std::path::Path;

/// The line that separates documents in a text file, and the text of the end-of-document token.
pub const SEPARATOR: &str = "<|endoftext|>";

/// One source's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Documents {
    /// The source's name.
    pub name: String,
    /// The user's weight, if any.
    pub weight: Option<f64>,
    /// Non-empty documents in file order.
    pub texts: Vec<String>,
}

impl Documents {
    /// Bytes of text, separators not counted.
    pub fn text_bytes(&self) -> u64 {
        self.texts.iter().map(|t| t.len() as u64).sum()
    }
}

/// Reads every document of `source`.
///
/// Text files: documents are separated by a line holding only `<|endoftext|>`; the newline before that line is not part
/// of the document; a file without such a line is one document. JSONL files: one object per line with a string field
/// `text`, blank lines skipped. Documents of white space only are dropped.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read; [`Error::Format`] for broken xz data, invalid UTF-8 (byte offset given), a
/// malformed JSONL line (line number given), or a source without any text.
pub fn read_documents(source: &SourceSpec) -> Result<Documents> {
    let path = source.path();
    let text = decode(&path, raw_bytes(source)?)?;
    let mut texts = if is_jsonl(&path) { parse_jsonl(&path, &text)? } else { split_text(&text) };
    texts.retain(|t| !t.trim().is_empty());
    if texts.is_empty() {
        return Err(Error::format(path, "holds no text: every document is empty; remove this source or fill it"));
    }
    Ok(Documents { name: source.name.clone(), weight: source.weight, texts })
}

fn raw_bytes(source: &SourceSpec) -> Result<Vec<u8>> {
    match &source.origin {
        Origin::File(path) => std::fs::read(path).map_err(|e| Error::io(path, e)),
        Origin::Embedded { bytes, .. } => Ok(bytes.to_vec()),
    }
}

fn ends_with(path: &Path, ending: &str) -> bool {
    path.to_string_lossy().to_ascii_lowercase().ends_with(ending)
}

fn is_jsonl(path: &Path) -> bool {
    ends_with(path, ".jsonl") || ends_with(path, ".jsonl.xz")
}

fn decode(path: &Path, raw: Vec<u8>) -> Result<String> {
    let bytes = if ends_with(path, ".xz") {
        let mut plain = Vec::new();
        lzma_rs::xz_decompress(&mut raw.as_slice(), &mut plain)
            .map_err(|e| Error::format(path, format!("not a whole xz file: {e:?}")))?;
        plain
    } else {
        raw
    };
    String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        Error::format(path, format!("not UTF-8 text: the first bad byte is at offset {offset}"))
    })
}

fn split_text(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.split_inclusive('\n') {
        let last = documents.len() - 1;
        if line.trim_end_matches(['\n', '\r']) == SEPARATOR {
            if documents[last].ends_with('\n') {
                documents[last].pop();
            }
            documents.push(String::new());
        } else {
            documents[last].push_str(line);
        }
    }
    documents
}

#[derive(serde::Deserialize)]
struct JsonLine {
    text: String,
}

fn parse_jsonl(path: &Path, text: &str) -> Result<Vec<String>> {
    let mut documents = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let parsed: JsonLine = serde_json::from_str(line).map_err(|e| {
            let number = index + 1;
            Error::format(path, format!("line {number}: expected a JSON object with a string field \"text\": {e}"))
        })?;
        documents.push(parsed.text);
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let list = SourceSpec::parse_list(&[path.display().to_string()])?;
        Ok(read_documents(&list[0])?.texts)
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut &bytes[..], &mut packed).unwrap();
        packed
    }

    const TEXT: &str = "one\nline two\n<|endoftext|>\n\n<|endoftext|>\nthree <|endoftext|> stays\n";

    #[test]
    fn every_format_gives_the_same_documents() {
        let want = ["one\nline two", "three <|endoftext|> stays\n"];
        let jsonl = "{\"text\": \"one\\nline two\"}\n\n{\"text\": \" \"}\n{\"id\": 3, \"text\": \"three <|endoftext|> stays\\n\"}\n";
        assert_eq!(read("a.txt", TEXT.as_bytes()).unwrap(), want);
        assert_eq!(read("a.txt.xz", &xz(TEXT.as_bytes())).unwrap(), want);
        assert_eq!(read("a.jsonl", jsonl.as_bytes()).unwrap(), want);
        assert_eq!(read("a.jsonl.xz", &xz(jsonl.as_bytes())).unwrap(), want);
        assert_eq!(read("a.txt", b"no separator\r\n").unwrap(), ["no separator\r\n"]);
    }

    #[test]
    fn bad_content_says_where() {
        let broken = &xz(TEXT.as_bytes())[..40];
        for (name, bytes, word) in [
            ("a.jsonl", &b"{\"text\": \"a\"}\n{\"text\": 3}\n"[..], "line 2"),
            ("a.jsonl", b"{\"text\": \"a\"}\n\n{\"body\": \"b\"}\n", "line 3"),
            ("a.jsonl", b"{\"text\": \"a\"", "line 1"),
            ("a.txt", b"fine \xff", "offset 5"),
            ("a.txt", b"", "no text"),
            ("a.txt", b"  \n<|endoftext|>\n \n", "no text"),
            ("a.txt.xz", broken, "xz"),
            ("a.txt.xz", b"plain", "xz"),
        ] {
            let message = read(name, bytes).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains(name), "{name} {bytes:?}: {message}");
        }
    }
}
