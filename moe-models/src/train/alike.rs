//! Whether ranks were told the same: where they were not, their weights would drift apart, and nobody would see it.

use super::config::TrainConfig;
use super::ranks::{Ranks, exchange};
use super::trainer::Corpus;
use crate::train::data::ValidSource;
use crate::{Error, Result};
use moe_parallel::Phase;

/// Refuses ranks that have other settings, have read other text, or train another model by its description, than rank 0. Paths may
/// differ; that weights which ranks begin with are the same is the caller's.
///
/// # Errors
/// [`Error::OtherRank`] on every rank; as [`Ranks`].
pub(super) fn check(
    ranks: &dyn Ranks,
    config: &TrainConfig,
    corpus: &Corpus,
    description: Result<String>,
) -> Result<()> {
    let told = description.and_then(|description| told(config, corpus, &description));
    compare(&exchange(ranks, Phase::Start, told)?)
}

/// Hashes of a rank's settings, of its text and of its model.
fn told(config: &TrainConfig, corpus: &Corpus, description: &str) -> Result<Vec<u64>> {
    let settings = TrainConfig { data: Vec::new(), valid: Vec::new(), data_cache: None, ..config.clone() };
    let of_valid = |source: &ValidSource| (source.name().to_owned(), source.num_targets(), source.target_bytes());
    let valid: Vec<_> = corpus.valid.iter().map(of_valid).collect();
    let hash = |json: serde_json::Result<Vec<u8>>| -> Result<u64> {
        let json = json.map_err(|e| Error::Config(format!("the settings cannot be told: {e}")))?;
        let hash = blake3::hash(&json);
        Ok(u64::from_le_bytes(hash.as_bytes().first_chunk().copied().unwrap_or_default()))
    };
    let text = (&corpus.fingerprints, corpus.sampler.shares(), valid);
    Ok(vec![
        hash(serde_json::to_vec(&settings))?,
        hash(serde_json::to_vec(&text))?,
        hash(serde_json::to_vec(description))?,
    ])
}

/// Of what all ranks have told.
fn compare(all: &[Vec<u64>]) -> Result<()> {
    for (rank, told) in all.iter().enumerate() {
        let text = match told.iter().zip(&all[0]).position(|(own, first)| own != first) {
            None => continue,
            Some(0) => "has other settings than rank 0; start all ranks with the same arguments and the same program",
            Some(1) => "has read other text than rank 0; give all ranks the same files",
            Some(_) => "trains another model than rank 0; give all ranks the same flags, config.json and model folder",
        };
        return Err(Error::OtherRank { rank, text: text.into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::{Documents, Packer};
    use crate::train::tokenizer::train_bpe;

    #[test]
    fn ranks_that_were_told_different_things_are_refused() {
        let of_model = |config: &TrainConfig, text: &str, model: &str| {
            let documents = Documents { name: "d".into(), weight: None, texts: vec![text.repeat(400)] };
            let tokenizer = train_bpe(std::slice::from_ref(&documents), 262).unwrap();
            let packed = Packer::new(&tokenizer, 0, 262).unwrap().pack(&documents).unwrap();
            told(config, &Corpus::new(vec![packed], Vec::new(), config).unwrap(), model).unwrap()
        };
        let of = |config: &TrainConfig, text: &str| of_model(config, text, "{}");
        let config = TrainConfig::default().resolved(8).unwrap();
        let first = of(&config, "one and two, ");
        // Files may lie elsewhere.
        let elsewhere = TrainConfig { data: vec!["/elsewhere".into()], ..config.clone() };
        compare(&[first.clone(), of(&elsewhere, "one and two, ")]).unwrap();
        let message = |second: Vec<u64>| compare(&[first.clone(), second]).unwrap_err().to_string();
        let other = TrainConfig { lr: 1e-3, ..config.clone() };
        assert!(message(of(&other, "one and two, ")).contains("rank 1: has other settings than rank 0"));
        assert!(message(of(&config, "one and six, ")).contains("rank 1: has read other text than rank 0"));
        let deeper = of_model(&config, "one and two, ", "{\"num_hidden_layers\": 3}");
        assert!(message(deeper).contains("rank 1: trains another model than rank 0"));
    }
}
