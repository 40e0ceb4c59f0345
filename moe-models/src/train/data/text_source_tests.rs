//! Characters across the borders of chunks, compressed and not, and files that change.

use super::*;

pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn opened(path: &Path) -> TextSource {
    TextSource::open(&SourceSpec::parse_list(&[path.display().to_string()]).unwrap()[0], &mut |_, _| ()).unwrap()
}

fn text(source: &TextSource) -> Result<String> {
    let read = AtomicU64::new(0);
    let (mut characters, mut text) = (source.characters(&read)?, String::new());
    loop {
        let chunk = characters.next_chunk()?;
        if chunk.is_empty() {
            characters.finish()?;
            assert_eq!(read.into_inner(), source.stored_bytes());
            return Ok(text);
        }
        assert!(chunk.len() <= CHUNK_BYTES);
        text.push_str(chunk);
    }
}

#[test]
fn characters_that_lie_across_chunks_stay_whole() {
    let dir = tempfile::tempdir().unwrap();
    for shift in 0..4 {
        let want = format!("{}{}", "a".repeat(shift), "é日🦀".repeat(50_000));
        for (name, bytes) in [("a.txt", want.clone().into_bytes()), ("a.txt.xz", xz(want.as_bytes()))] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            assert!(text(&opened(&path)).unwrap() == want, "{name}, {shift}");
        }
    }
}

#[test]
fn several_xz_streams_are_one_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt.xz");
    std::fs::write(&path, [xz(b"one "), xz(b"two")].concat()).unwrap();
    assert_eq!(text(&opened(&path)).unwrap(), "one two");
}

#[test]
fn bytes_that_are_no_text_are_named_by_their_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    let good = "é".repeat(CHUNK_BYTES);
    // In the middle, and a character that the end of the file cuts.
    for tail in [&b"\xff and more"[..], "日".as_bytes().split_last().unwrap().1] {
        std::fs::write(&path, [good.as_bytes(), tail].concat()).unwrap();
        let message = text(&opened(&path)).unwrap_err().to_string();
        assert!(message.contains(&format!("offset {}", good.len())), "{message}");
    }
}

#[test]
fn the_hash_is_of_the_content_and_a_change_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("a.txt"), dir.path().join("b.txt"));
    std::fs::write(&path, "one text").unwrap();
    std::fs::write(&other, "one text").unwrap();
    let source = opened(&path);
    assert_eq!(source.hash(), opened(&other).hash());
    std::fs::write(&path, "two text").unwrap();
    assert_ne!(source.hash(), opened(&path).hash());
    assert!(text(&source).unwrap_err().to_string().contains("changed while it was read"));
}

#[cfg(unix)]
#[test]
fn a_pipe_is_read_once_and_held() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe.txt");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let writer = std::thread::spawn({
        let path = path.clone();
        move || std::fs::write(path, "from a pipe").unwrap()
    });
    let source = opened(&path);
    writer.join().unwrap();
    (0..2).for_each(|_| assert_eq!(text(&source).unwrap(), "from a pipe"));
}
