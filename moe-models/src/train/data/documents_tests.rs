//! Documents of every format, however their bytes are cut, against a reader that holds the file whole.

use super::*;
use crate::train::data::SourceSpec;
use crate::train::data::text_source::tests::xz;
use moe_core::CounterRng;

fn read(name: &str, bytes: &[u8]) -> Result<Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let list = SourceSpec::parse_list(&[path.display().to_string()])?;
    let source = TextSource::open(&list[0], &mut |_, _| ())?;
    let pieces = source.pieces(&AtomicU64::new(0)).collect::<Result<Vec<_>>>()?;
    Ok(joined(pieces))
}

fn joined(pieces: impl IntoIterator<Item = Piece<String>>) -> Vec<String> {
    let (mut documents, mut open) = (Vec::new(), String::new());
    for piece in pieces {
        open.push_str(&piece.text);
        if piece.ends_document {
            documents.push(std::mem::take(&mut open));
        }
    }
    assert!(open.is_empty(), "a document without an end");
    documents
}

/// What a text file holds.
fn split_whole(text: &str) -> Vec<String> {
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
    documents.retain(|text| !text.trim().is_empty());
    documents
}

const TEXT: &str = "one\nline two\n<|endoftext|>\n\n<|endoftext|>\nthree <|endoftext|> stays\n";

#[test]
fn every_format_gives_the_same_documents() {
    let want = ["one\nline two", "three <|endoftext|> stays\n"];
    let jsonl = "{\"text\": \"one\\nline two\"}\n\n{\"text\": \" \"}\n{\"id\": 3, \"text\": \"three <|endoftext|> stays\\n\"}\r\n";
    assert_eq!(read("a.txt", TEXT.as_bytes()).unwrap(), want);
    assert_eq!(read("a.txt.xz", &xz(TEXT.as_bytes())).unwrap(), want);
    assert_eq!(read("a.jsonl", jsonl.as_bytes()).unwrap(), want);
    assert_eq!(read("a.jsonl", jsonl.trim_end().as_bytes()).unwrap(), want, "no newline at the end");
    assert_eq!(read("a.jsonl.xz", &xz(jsonl.as_bytes())).unwrap(), want);
    assert_eq!(read("a.txt", b"no separator\r\n").unwrap(), ["no separator\r\n"]);
}

#[test]
fn text_however_cut_has_the_documents_of_the_whole() {
    let words = ["<|endoftext|>", "<|endoftext|>\n", "\n<|endoftext|>\r\n", "<|end", "\n", "\r", " ", "a", "é\n", "<"];
    let mut rng = CounterRng::new(20_261_125, 0);
    for case in 0..4000 {
        let count = rng.below(12);
        let text: String = (0..count).map(|_| words[rng.below(words.len() as u32) as usize]).collect();
        let (mut parser, mut ready, mut rest) = (Text::default(), VecDeque::new(), text.as_str());
        while let Some(c) = rest.chars().next() {
            let size = rest.floor_char_boundary(rng.below(20) as usize).max(c.len_utf8());
            parser.push(&rest[..size], &mut ready);
            rest = &rest[size..];
        }
        parser.finish(&mut ready);
        assert_eq!(joined(ready), split_whole(&text), "case {case}: {text:?}");
    }
}

/// Larger than a chunk, so that lines, separators and characters lie across chunks.
#[test]
fn long_files_have_the_documents_of_the_whole() {
    let line =
        |i: u64| format!("{} — line {i} of a file{}\n", "é".repeat((i % 90) as usize), "\r".repeat((i % 3) as usize));
    let text: String = (0..20_000).map(|i| if i % 97 == 3 { format!("{SEPARATOR}\n") } else { line(i) }).collect();
    let want = split_whole(&text);
    assert!(want.len() > 200);
    assert!(read("a.txt", text.as_bytes()).unwrap() == want);
    assert!(read("a.txt.xz", &xz(text.as_bytes())).unwrap() == want);
    let jsonl: String = want.iter().map(|text| format!("{}\n", serde_json::json!({ "text": text }))).collect();
    assert!(read("a.jsonl", jsonl.as_bytes()).unwrap() == want);
}

#[test]
fn bad_content_says_where() {
    let broken = &xz(TEXT.as_bytes())[..40];
    let mut flipped = xz(TEXT.repeat(9).as_bytes());
    flipped[40] ^= 1;
    for (name, bytes, word) in [
        ("a.jsonl", &b"{\"text\": \"a\"}\n{\"text\": 3}\n"[..], "line 2"),
        ("a.jsonl", b"{\"text\": \"a\"}\n\n{\"body\": \"b\"}\n", "line 3"),
        ("a.jsonl", b"{\"text\": \"a\"", "line 1"),
        ("a.txt", b"fine \xff", "offset 5"),
        ("a.txt", b"", "no text"),
        ("a.txt", b"  \n<|endoftext|>\n \n", "no text"),
        ("a.jsonl", b"{\"text\": \" \"}\n", "no text"),
        ("a.txt.xz", broken, "xz"),
        ("a.txt.xz", &flipped, "xz"),
        ("a.txt.xz", b"plain", "xz"),
    ] {
        let message = read(name, bytes).unwrap_err().to_string();
        assert!(message.contains(word) && message.contains(name), "{name} {bytes:?}: {message}");
    }
}
