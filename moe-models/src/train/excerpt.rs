//! A small excerpt of the training corpus, linked into the program so that training runs from a clean clone.

use super::data::SourceSpec;

macro_rules! excerpt {
    ($($name:literal),* $(,)?) => {
        &[$((
            concat!($name, ".txt.xz"),
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/data/excerpt/", $name, ".txt.xz")),
        )),*]
    };
}

const FILES: &[(&str, &[u8])] = excerpt!("code", "dialogue", "fiction", "maths", "reference", "textbook");

/// The excerpt's sources, one per domain.
pub fn sources() -> Vec<SourceSpec> {
    FILES.iter().map(|(file_name, bytes)| SourceSpec::embedded(file_name, bytes)).collect()
}
