//! What the user names as data: `PATH` or `PATH=WEIGHT`, a file or a folder. Reads folder listings, no contents.

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Where a source's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// Bytes linked into the program, under a file name whose endings say the format.
    Embedded {
        /// Name with its endings, such as `fiction.txt.xz`.
        file_name: &'static str,
        /// The file's content.
        bytes: &'static [u8],
    },
}

/// One source of text: one file, with the share of training it asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceSpec {
    /// Name in metrics and messages: the file name without its endings; unique within one list.
    pub name: String,
    /// Relative share given by the user, if any.
    pub weight: Option<f64>,
    /// Where the text is.
    pub origin: Origin,
}

const ENDINGS: [&str; 4] = [".txt", ".jsonl", ".txt.xz", ".jsonl.xz"];

fn has_known_ending(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    ENDINGS.iter().any(|e| name.ends_with(e))
}

/// `fiction.txt.xz` becomes `fiction`; a dot inside the name stays.
fn stem(file_name: &str) -> String {
    let lower = file_name.to_ascii_lowercase();
    let cut = ENDINGS.iter().filter(|e| lower.ends_with(**e)).map(|e| e.len()).max().unwrap_or(0);
    file_name[..file_name.len() - cut].to_owned()
}

impl SourceSpec {
    /// A source linked into the program.
    pub fn embedded(file_name: &'static str, bytes: &'static [u8]) -> Self {
        Self { name: stem(file_name), weight: None, origin: Origin::Embedded { file_name, bytes } }
    }

    /// The path, or the embedded name, for messages.
    pub fn path(&self) -> PathBuf {
        match &self.origin {
            Origin::File(path) => path.clone(),
            Origin::Embedded { file_name, .. } => PathBuf::from("<embedded>").join(file_name),
        }
    }

    /// Sources of validation text: as [`SourceSpec::parse_list`], without weights.
    ///
    /// # Errors
    /// As [`SourceSpec::parse_list`]; [`Error::Config`] for a weight, which would have no effect.
    pub fn parse_valid_list(arguments: &[String]) -> Result<Vec<Self>> {
        let sources = Self::parse_list(arguments)?;
        match sources.iter().find_map(|source| Some((source.path(), source.weight?))) {
            Some((path, weight)) => Err(Error::Config(format!(
                "validation source {} has the weight {weight}, but validation weighs every token alike; drop the weight",
                path.display()
            ))),
            None => Ok(sources),
        }
    }

    /// Sources from `PATH` or `PATH=WEIGHT` arguments. A folder stands for its `.txt`, `.jsonl`, `.txt.xz` and
    /// `.jsonl.xz` files (sorted by name, no recursion), each a source with the folder's weight; so the files of a
    /// corpus with one file per domain are reported one by one.
    ///
    /// # Errors
    /// [`Error::Io`] for a path that cannot be read, [`Error::Config`] for a weight that is not a positive number, an
    /// unknown file ending or a folder without text files.
    pub fn parse_list(arguments: &[String]) -> Result<Vec<Self>> {
        let mut sources = Vec::new();
        for argument in arguments {
            let (path, weight) = split_weight(argument)?;
            for file in files_of(&path)? {
                let name = stem(&file.file_name().unwrap_or_default().to_string_lossy());
                sources.push(Self { name, weight, origin: Origin::File(file) });
            }
        }
        make_names_unique(&mut sources);
        Ok(sources)
    }
}

/// Splits at the last `=` when a number follows it; otherwise the whole argument is the path.
fn split_weight(argument: &str) -> Result<(PathBuf, Option<f64>)> {
    let Some((path, text)) = argument.rsplit_once('=') else { return Ok((argument.into(), None)) };
    match text.parse::<f64>() {
        Ok(weight) if weight.is_finite() && weight > 0.0 => Ok((path.into(), Some(weight))),
        Ok(weight) => Err(Error::Config(format!("weight of {path} must be a positive number, got {weight}"))),
        Err(_) => Ok((argument.into(), None)),
    }
}

fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_dir() {
        if !has_known_ending(path) {
            let reason = format!("unknown file ending; expected one of {}", ENDINGS.join(", "));
            return Err(Error::Config(format!("{}: {reason}", path.display())));
        }
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let file = entry.map_err(|e| Error::io(path, e))?.path();
        if file.is_file() && has_known_ending(&file) {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::Config(format!(
            "{}: the folder holds no text; expected files ending in {}",
            path.display(),
            ENDINGS.join(", ")
        )));
    }
    Ok(files)
}

/// Names are metric tags, so the second `fiction` becomes `fiction-2`.
fn make_names_unique(sources: &mut [SourceSpec]) {
    let mut taken = std::collections::HashSet::new();
    for source in sources {
        let base = source.name.clone();
        let mut count = 1;
        while !taken.insert(source.name.clone()) {
            count += 1;
            source.name = format!("{base}-{count}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[SourceSpec]) -> Vec<&str> {
        list.iter().map(|s| s.name.as_str()).collect()
    }

    #[test]
    fn a_folder_stands_for_its_files() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["b.txt", "a.jsonl.xz", "v1.2.txt.xz", "notes.md"] {
            std::fs::write(dir.path().join(file), "x").unwrap();
        }
        let arguments = [format!("{}=2.5", dir.path().display()), dir.path().join("b.txt").display().to_string()];
        let list = SourceSpec::parse_list(&arguments).unwrap();
        assert_eq!(names(&list), ["a", "b", "v1.2", "b-2"]);
        assert_eq!(list.iter().map(|s| s.weight).collect::<Vec<_>>(), [Some(2.5), Some(2.5), Some(2.5), None]);
    }

    #[test]
    fn validation_text_carries_no_weight() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("b.txt"), "x").unwrap();
        let path = dir.path().join("b.txt").display().to_string();
        assert_eq!(names(&SourceSpec::parse_valid_list(std::slice::from_ref(&path)).unwrap()), ["b"]);
        let message = SourceSpec::parse_valid_list(&[format!("{path}=2")]).unwrap_err().to_string();
        assert!(message.contains("b.txt") && message.contains("weight 2"), "{message}");
    }

    #[test]
    fn bad_arguments_name_themselves() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("b.txt"), "x").unwrap();
        std::fs::write(dir.path().join("b.md"), "x").unwrap();
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        for (tail, word) in [
            ("b.txt=0", "positive"),
            ("b.txt=-1", "positive"),
            ("b.txt=inf", "positive"),
            ("b.txt=x", "b.txt=x"),
            ("missing.txt", "missing.txt"),
            ("b.md", "file ending"),
            ("empty", "holds no text"),
        ] {
            let message =
                SourceSpec::parse_list(&[format!("{}/{tail}", dir.path().display())]).unwrap_err().to_string();
            assert!(message.contains(word), "{tail}: {message}");
        }
    }
}
