//! The report: tables, paired differences and curves from records, nothing else.

use super::claims;
use super::experiment::{Experiment, Job};
use super::found::Found;
use super::reach;
use super::record::Record;
use super::recovery;
use super::runner::Place;
use crate::plot::{Curve, draw};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// The runs that are missing, and how long they would take.
pub(super) fn plan(jobs: &[Job], place: &Place) -> String {
    let mut by_experiment: BTreeMap<&str, (usize, usize, f64)> = BTreeMap::new();
    for job in jobs {
        let (all, missing, minutes) = by_experiment.entry(&job.experiment).or_default();
        *all += 1;
        if !place.is_done(job) {
            *missing += 1;
            *minutes += job.minutes;
        }
    }
    let mut text = format!("{:<16}{:>6}{:>10}{:>18}\n", "experiment", "runs", "missing", "thread-minutes");
    let mut total = 0.0;
    for (id, (all, missing, minutes)) in by_experiment {
        let _ = writeln!(text, "{id:<16}{all:>6}{missing:>10}{minutes:>18.0}");
        total += minutes;
    }
    let _ = writeln!(text, "{:.1} hours on two threads", total / 120.0);
    text
}

/// Writes `report.md` and a picture for each experiment that has records.
pub(super) fn write(experiments: &[Experiment], records: &Path) -> Result<()> {
    std::fs::create_dir_all(records).with_context(|| format!("cannot make {}", records.display()))?;
    let mut text = String::from(
        "# Quality\n\nMade by `cargo xtask repro quality` of the records in this folder. Bits per byte are of validation text after the\n\
         last step; differences are paired by seed, with their 95% interval (Student's t).\n",
    );
    let all = experiments.iter().map(|e| Found::read(e, records)).collect::<Result<Vec<_>>>()?;
    claims::section(&mut text, &all)?;
    for found in all {
        let experiment = found.experiment;
        if found.is_empty() {
            let _ = write!(text, "\n## {}\n\nNo run of `{}` has ended yet.\n", experiment.title, experiment.id);
            continue;
        }
        section(&mut text, &found)?;
        let picture = |text: &mut String, name: &str, title: &str, curves: &[Curve]| -> Result<()> {
            let file = format!("{}{name}.svg", experiment.id);
            let _ = write!(text, "\n![{title}]({file})\n");
            draw(curves, title, &records.join(file))
        };
        picture(&mut text, "", "bits per byte against tokens", &found.curves())?;
        if let Some(whole) = &experiment.recovery_of {
            let curves = recovery::section(&mut text, &found, whole)?;
            if !curves.is_empty() {
                picture(&mut text, "-won-back", "% of the lost quality won back", &curves)?;
            }
        }
        if !experiment.reach.is_empty() {
            let curves = reach::section(&mut text, &found)?;
            if !curves.is_empty() {
                picture(&mut text, "-above-goal", "bits per byte above the goal, by budget", &curves)?;
            }
        }
    }
    let path = records.join("report.md");
    let unfinished = records.join("report.unfinished");
    std::fs::write(&unfinished, &text)?;
    std::fs::rename(&unfinished, &path)?;
    println!("{text}\nin {}", path.display());
    Ok(())
}

fn section(text: &mut String, found: &Found<'_>) -> Result<()> {
    let experiment = found.experiment;
    let _ = write!(
        text,
        "\n## {}\n\nThe paper: {}\n\nHere: {}\n\nTrained on (bytes as stored; .xz files are compressed): {}.\n",
        experiment.title,
        experiment.published.trim(),
        experiment.differences.trim(),
        found.text()?
    );
    *text += "\n| run | bits per byte | seeds | tokens, M | parameters, M | per token, M | MFLOP a token | minutes |\n|---|---|---|---|---|---|---|---|\n";
    for (name, own) in &found.by_run {
        let Some(first) = own.values().next() else {
            let _ = writeln!(text, "| {name} | - | 0 | | | | | |");
            continue;
        };
        let count = own.len() as f64;
        let mean = |of: &dyn Fn(&Record) -> f64| own.values().map(of).sum::<f64>() / count;
        let _ = writeln!(
            text,
            "| {name} | {:.4} | {} | {:.2} | {:.3} | {:.3} | {:.3} | {:.1} |",
            mean(&|record| record.last()),
            own.len(),
            first.train_tokens as f64 / 1e6,
            first.total_parameters as f64 / 1e6,
            first.active_parameters as f64 / 1e6,
            first.flops_per_token as f64 / 1e6,
            mean(&|record| record.minutes),
        );
    }
    if experiment.pairs.is_empty() {
        return Ok(());
    }
    *text += "\n| difference | bits per byte | 95% interval | seeds | |\n|---|---|---|---|---|\n";
    for [first, second] in &experiment.pairs {
        let Some(of) = found.difference(first, second)? else {
            let _ = writeln!(text, "| {first} minus {second} | - | | 0 | |");
            continue;
        };
        let interval =
            of.margin.map_or("-".into(), |margin| format!("{:.4} to {:.4}", of.mean - margin, of.mean + margin));
        let verdict = match (of.is_clear(), of.mean < 0.0) {
            (false, _) => "not told apart",
            (true, true) => "lower",
            (true, false) => "higher",
        };
        let _ = writeln!(text, "| {first} minus {second} | {:+.4} | {interval} | {} | {verdict} |", of.mean, of.count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repro::quality::record::tests::record;

    const TEXT: &str = r#"
        title = "t"
        published = "p"
        differences = "d"
        seeds = [1]
        train_tokens = 100
        warmup_share = 0.1
        flags = []
        pairs = [["cut", "whole"]]
        recovery_of = "whole"
        [[reach]]
        title = "cut against whole"
        published = "5x"
        goal = "whole"
        by = ["cut"]
        [[claim]]
        says = "cutting costs nothing"
        published = "0"
        lower = ["cut", "whole"]
        [[claim]]
        says = "five times less"
        published = "5x"
        saves = { reach = "cut against whole", times = 5.0 }
        [[claim]]
        says = "a half less"
        published = "2x"
        saves = { reach = "cut against whole", times = 0.5 }
        [[claim]]
        says = "all comes back"
        published = "96%"
        wins-back = { run = "cut", share = 0.96 }
        [[run]]
        name = "whole"
        minutes = 1.0
        [[run]]
        name = "cut"
        minutes = 1.0
    "#;

    #[test]
    fn a_report_has_the_tables_and_pictures_that_its_experiment_asks_for() {
        let dir = std::env::temp_dir().join(format!("repro-report-{}", std::process::id()));
        let write_run = |experiment: &str, run: &str, curve: &[(u64, f64)]| {
            let own = Record { experiment: experiment.into(), run: run.into(), ..record(curve) };
            own.write(&Record::path(&dir, experiment, run)).unwrap();
        };
        write_run("x", "whole", &[(0, 2.0), (500_000, 1.98), (1_000_000, 1.95)]);
        write_run("x", "cut", &[(0, 2.4), (500_000, 2.1), (1_000_000, 1.9)]);
        write(&[Experiment::parse(TEXT, "x".into(), false).unwrap()], &dir).unwrap();
        let text = std::fs::read_to_string(dir.join("report.md")).unwrap();
        for part in [
            "| cutting costs nothing | 0 | cut minus whole: -0.0500 (one seed) | not told apart here |",
            "| five times less | 5x | compute, by seed: more than 1.00 | in 0 of 1 seeds |",
            "| a half less | 2x | compute, by seed: more than 1.00 | in 1 of 1 seeds |",
            "| all comes back | 96% | cut: +112.5 (one seed) % | not told apart here |",
            "| cut minus whole | -0.0500 | - | 1 | not told apart |",
            "| whole | +0.0000 | +0.0000 | 1 | - | - |",
            "| cut | +0.4000 | -0.0500 | 1 | 1.00 | 1.00 |",
            "| 0.50 | 70.0 |",
            "| cut against whole | less than 1.00 | more than 1.00 | - | more than 1.00 | - | more than 1.00 | - | 5x |",
            "(x.svg)",
            "(x-won-back.svg)",
            "(x-above-goal.svg)",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let x = || Experiment::parse(TEXT, "x".into(), false).unwrap();
        let place = Place { runs: dir.join("runs"), records: dir.clone() };
        let check = |text: &[String]| place.check_text(x().beside().iter(), text);
        check(&[]).unwrap();
        assert!(check(&["other, 9 bytes".into()]).unwrap_err().to_string().contains("other, 9 bytes"));
        // Models of a folder are of one text.
        place.keep_text(&["a".into()]).unwrap();
        place.keep_text(&["a".into()]).unwrap();
        let text = place.keep_text(&["b".into()]).unwrap_err().to_string();
        assert!(text.contains("were trained on a, these runs would be on b"), "{text}");
        // Of another text than what it is compared with.
        let other = Record { experiment: "x".into(), run: "cut".into(), data: vec!["a".into()], ..record(&[(0, 2.4)]) };
        other.write(&Record::path(&dir, "x", "cut")).unwrap();
        let text = write(&[x()], &dir).unwrap_err().to_string();
        assert!(text.contains("cut was trained on a, whole on the excerpt in the repository"), "{text}");
        for picture in ["x.svg", "x-won-back.svg", "x-above-goal.svg"] {
            assert!(std::fs::read_to_string(dir.join(picture)).unwrap().contains("cut"), "{picture}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
