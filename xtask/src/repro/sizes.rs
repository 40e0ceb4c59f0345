//! `cargo xtask repro sizes`: the paper's table of sizes. Parameters of its models and their bytes are counted, those of small
//! models of the same kinds are measured as files; `moe-compress/examples/sizes.rs` does both.

use crate::bench::{header, keep, split_output};
use crate::shell::{cargo, output, root};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder that gets the report.
    #[arg(long, default_value = "runs/repro")]
    out: PathBuf,
}

const FORMS: [&str; 4] = ["f32", "bf16", "int8", "int4"];

/// A model of the paper.
struct Published {
    preset: &'static str,
    name: &'static str,
    /// Of its architecture, in billions.
    parameters: &'static str,
    /// How much smaller than the MoE before it, in the paper.
    smaller: Option<&'static str>,
}

const fn published(
    preset: &'static str,
    name: &'static str,
    parameters: &'static str,
    smaller: Option<&'static str>,
) -> Published {
    Published { preset, name, parameters, smaller }
}

/// Each MoE, and what is made smaller of it.
///
/// # Source
/// Paper section 4 and its slides (factors); parameters follow from the architectures of table 1.
const PAPER: [Published; 6] = [
    published("350m-moe-128", "350M+MoE-128", "13.15", None),
    published("350m-pr-moe-32-64", "350M+PR-MoE-32/64", "4.12", Some("3.2")),
    published("350m-pr-moe-32-64-mos", "350M+PR-MoE+L21+MoS", "3.54", Some("3.7")),
    published("1.3b-moe-128", "1.3B+MoE-128", "52.47", None),
    published("1.3b-pr-moe-64-128", "1.3B+PR-MoE-64/128", "31.39", Some("1.7")),
    published("1.3b-pr-moe-64-128-mos", "1.3B+PR-MoE+L21+MoS", "26.94", Some("1.9")),
];

/// What is counted of a model of the paper.
#[derive(Deserialize)]
struct Counted {
    counted: String,
    parameters: u64,
    bytes: BTreeMap<String, u64>,
}

/// What is measured of a small model in one form.
#[derive(Deserialize)]
struct Measured {
    measured: String,
    form: String,
    parameters: u64,
    counted_bytes: u64,
    tensor_bytes: u64,
    file_bytes: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let out = root().join(&args.out);
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let folders = root().join("target/sizes");
    let clear = || if folders.exists() { std::fs::remove_dir_all(&folders) } else { Ok(()) };
    clear()?;
    let mut program = cargo(&["run", "--quiet", "--release", "--package", "moe-compress", "--example", "sizes", "--"]);
    let printed = output(program.arg(&folders));
    clear()?;
    let (rows, _) = split_output(&printed?)?;
    let report = format!("# Sizes\n\n```text\n{}\n```\n{}", header()?.trim_end(), report(&rows)?);
    keep(&out.join("sizes.md"), &report)
}

fn report(rows: &[Value]) -> Result<String> {
    let of = |key: &'static str| rows.iter().filter(move |row| row.get(key).is_some()).cloned();
    let counted = of("counted").map(serde_json::from_value).collect::<Result<Vec<Counted>, _>>()?;
    let measured = of("measured").map(serde_json::from_value).collect::<Result<Vec<Measured>, _>>()?;
    Ok(of_the_paper(&counted)? + &of_files(&measured)?)
}

/// Bytes of a model in a form, GB.
fn gigabytes(model: &Counted, form: &str) -> Result<f64> {
    let bytes = model.bytes.get(form).with_context(|| format!("{} has no bytes in {form}", model.counted))?;
    Ok(*bytes as f64 / 1e9)
}

fn of_the_paper(counted: &[Counted]) -> Result<String> {
    let mut text = String::from(
        "\nThe paper's models, counted from their presets: all parameters, beside those of the paper's architectures, and the\n\
         bytes of all tensors in files. int8 has a scale for each output, int4 one for each output and 32 inputs (the formats of\n\
         `compressed-tensors`); embeddings, norms, biases and gates stay in bf16. Smaller is smaller than the MoE above: in\n\
         parameters, and in bytes of int4 against its bf16.\n\n\
         | model | parameters, G | the paper's | smaller | the paper | f32, GB | bf16, GB | int8, GB | int4, GB | smaller in int4 |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    let find = |preset: &str| {
        let model = counted.iter().find(|model| model.counted == preset);
        model.with_context(|| format!("{preset} was not counted"))
    };
    let mut moe = find(PAPER[0].preset)?;
    for row in &PAPER {
        let model = find(row.preset)?;
        if row.smaller.is_none() {
            moe = model;
        }
        let factor = moe.parameters as f64 / model.parameters as f64;
        let (ours, paper) =
            row.smaller.map_or(("1".into(), "1".into()), |paper| (format!("{factor:.2}x"), format!("{paper}x")));
        let gigabytes_in = |form: &&str| Ok(format!("{:.2}", gigabytes(model, form)?));
        let bytes = FORMS.iter().map(gigabytes_in).collect::<Result<Vec<String>>>()?.join(" | ");
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} | {ours} | {paper} | {bytes} | {:.1}x |",
            row.name,
            model.parameters as f64 / 1e9,
            row.parameters,
            gigabytes(moe, "bf16")? / gigabytes(model, "int4")?,
        );
    }
    Ok(text)
}

fn of_files(measured: &[Measured]) -> Result<String> {
    let mut text = String::from(
        "\nSmall models of the same kinds, written with random weights (width 128, vocabulary of 1024): a PR-MoE of eight layers\n\
         with 8, 8, 16 and 16 experts, the MoE with twice the experts of its larger layers in all of them, and its student of\n\
         seven layers. Files are `.safetensors` with their headers; smaller is smaller than the MoE's in bf16.\n\n\
         | model | form | parameters | bytes of tensors, counted | bytes of tensors in files | bytes of files | smaller |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let whole = measured.iter().find(|row| row.form == "bf16").context("nothing was measured in bf16")?;
    for row in measured {
        let Measured { measured: name, form, parameters, counted_bytes, tensor_bytes, file_bytes } = row;
        ensure!(
            counted_bytes == tensor_bytes,
            "{name} in {form} holds {tensor_bytes} bytes of tensors, but {counted_bytes} were counted"
        );
        let factor = whole.file_bytes as f64 / *file_bytes as f64;
        let _ = writeln!(
            text,
            "| {name} | {form} | {parameters} | {counted_bytes} | {tensor_bytes} | {file_bytes} | {factor:.2}x |"
        );
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rows(int4_in_files: u64) -> Vec<Value> {
        // By the paper's formula, to six digits.
        let parameters = [13.1503e9, 4.12378e9, 3.54e9, 52.4676e9, 31.3855e9, 26.9392e9];
        let counted = PAPER.iter().zip(parameters).map(|(row, parameters)| {
            let bytes = json!({ "f32": 4.0 * parameters, "bf16": 2.0 * parameters, "int8": parameters, "int4": parameters / 2.0 });
            let whole = |value: &Value| value.as_f64().map(|bytes| bytes as u64);
            let bytes: BTreeMap<&str, u64> =
                FORMS.iter().filter_map(|form| Some((*form, whole(&bytes[*form])?))).collect();
            json!({ "counted": row.preset, "parameters": parameters as u64, "bytes": bytes })
        });
        let measured = [("MoE", "bf16", 100, 110), ("student", "int4", 25, 30)].map(|(name, form, tensors, files)| {
            let held = if form == "int4" { int4_in_files } else { tensors };
            json!({
                "measured": name, "form": form, "parameters": 50, "counted_bytes": tensors, "tensor_bytes": held, "file_bytes": files,
            })
        });
        counted.chain(measured).collect()
    }

    #[test]
    fn factors_stand_beside_the_papers() {
        let text = report(&rows(25)).unwrap();
        for part in [
            "| 350M+MoE-128 | 13.15 | 13.15 | 1 | 1 | 52.60 | 26.30 | 13.15 | 6.58 | 4.0x |",
            "| 350M+PR-MoE-32/64 | 4.12 | 4.12 | 3.19x | 3.2x |",
            "| 350M+PR-MoE+L21+MoS | 3.54 | 3.54 | 3.71x | 3.7x |",
            "| 1.3B+PR-MoE-64/128 | 31.39 | 31.39 | 1.67x | 1.7x |",
            "| 1.3B+PR-MoE+L21+MoS | 26.94 | 26.94 | 1.95x | 1.9x |",
            "| student | int4 | 50 | 25 | 25 | 30 | 3.67x |",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn files_that_hold_something_else_and_models_that_are_missing_are_errors() {
        assert!(report(&rows(24)).unwrap_err().to_string().contains("student in int4 holds 24 bytes"));
        let without = &rows(25)[1..];
        assert!(report(without).unwrap_err().to_string().contains("350m-moe-128 was not counted"));
        assert!(report(&rows(25)[..6]).unwrap_err().to_string().contains("bf16"));
    }
}
