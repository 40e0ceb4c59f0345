//! Each task's contexts, continuations and labels, letter by letter.

use super::*;
use crate::eval::Request;

#[track_caller]
fn parse(task: &str, line: &str) -> Item {
    (Task::named(task).unwrap().parse)(line).unwrap()
}

#[track_caller]
fn check_choices(item: &Item, want: &[(&str, &str)], chars: &[usize], label: usize) {
    let requests = want
        .iter()
        .map(|&(context, continuation)| Request { context: context.to_owned(), continuation: continuation.to_owned() });
    assert_eq!(*item, Item::Choice { requests: requests.collect(), chars: chars.to_vec(), label });
}

#[test]
fn lambada_splits_at_the_last_space() {
    let item = parse("lambada", r#"{"text": "\"Come,\" she said. \n\nHe  came with her"}"#);
    let request = |context: &str, continuation: &str| {
        Item::Cloze(Request { context: context.into(), continuation: continuation.into() })
    };
    assert_eq!(item, request("\"Come,\" she said. \n\nHe  came with", " her"));
    assert_eq!(parse("lambada", r#"{"text": "word"}"#), request("", " word"));
}

#[test]
fn piqa_asks_for_a_solution() {
    let line = r#"{"goal": "keep bread fresh", "sol1": "Leave it out ", "sol2": "Wrap it", "label": 1}"#;
    let context = "Question: keep bread fresh\nAnswer:";
    check_choices(&parse("piqa", line), &[(context, " Leave it out "), (context, " Wrap it")], &[13, 7], 1);
}

#[test]
fn hellaswag_joins_and_cleans() {
    let line = r#"{"activity_label": "Baking", "ctx_a": "A cook [header] kneads.", "ctx_b": "the Cook", "ctx": "",
        "endings": ["[step] rests  it.", "sings [title] A song."], "label": 0}"#;
    let context = "Baking: A cook kneads. The cook";
    check_choices(&parse("hellaswag", line), &[(context, "  rests it."), (context, " sings. A song.")], &[10, 14], 0);
}

#[test]
fn boolq_ends_in_no_or_yes() {
    let line = r#"{"question": "is the sky blue", "passage": "The sky is blue by day.", "answer": true}"#;
    let context = "The sky is blue by day.\nQuestion: is the sky blue?\nAnswer:";
    check_choices(&parse("boolq", line), &[(context, " no"), (context, " yes")], &[2, 3], 1);
}

#[test]
fn arc_and_openbookqa_differ_in_the_context() {
    let line = r#"{"id": "x", "question": "What melts?", "choices": ["ice", "sand", "fire"], "label": 0}"#;
    let asked = "Question: What melts?\nAnswer:";
    for task in ["arc_easy", "arc_challenge"] {
        let want = [(asked, " ice"), (asked, " sand"), (asked, " fire")];
        check_choices(&parse(task, line), &want, &[3, 4, 4], 0);
    }
    let bare = "What melts?";
    check_choices(&parse("openbookqa", line), &[(bare, " ice"), (bare, " sand"), (bare, " fire")], &[3, 4, 4], 0);
}

#[test]
fn winogrande_scores_what_follows_the_gap() {
    let line = r#"{"sentence": "The cup did not fit the bag as the _ was too large.", "option1": "cup",
        "option2": "bag", "label": 0}"#;
    let before = "The cup did not fit the bag as the";
    let (cup, bag) = (format!("{before} cup"), format!("{before} bag"));
    let rest = " was too large.";
    check_choices(&parse("winogrande", line), &[(&cup, rest), (&bag, rest)], &[38, 38], 0);
}

#[test]
fn triviaqa_doubles_the_question_mark() {
    let line = r#"{"question_id": "1", "question": "Who wrote it?", "answer": "A", "aliases": ["A", "The A."]}"#;
    let want = Item::Answer {
        prompt: "Question: Who wrote it??\nAnswer:".into(),
        accepted: vec!["A".into(), "The A.".into()],
    };
    assert_eq!(parse("triviaqa", line), want);
}

#[test]
fn webqs_drops_answers_that_begin_with_another() {
    let line = r#"{"id": "1", "question": "where?", "answers": ["Rome", "Paris, France", "Paris", "romE"]}"#;
    let request = |continuation| Request::spaced("Question: where?\nAnswer:", continuation);
    assert_eq!(parse("webqs", line), Item::AnyGreedy(["Paris", "Rome", "romE"].map(request).to_vec()));
}

#[test]
fn refused_lines_say_why() {
    for (task, line, part) in [
        ("piqa", r#"{"goal": "g", "sol1": "a", "label": 0}"#, "sol2"),
        ("piqa", r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}"#, "label 2"),
        ("boolq", r#"{"question": "q", "passage": "p", "answer": 1}"#, "boolean"),
        ("winogrande", r#"{"sentence": "s", "option1": "a", "option2": "b", "label": 0}"#, "gap"),
        ("triviaqa", r#"{"question": "q", "aliases": []}"#, "aliases"),
        ("webqs", r#"{"question": "q", "answers": []}"#, "answers"),
        ("lambada", "nothing", "line 1"),
    ] {
        let error = (Task::named(task).unwrap().parse)(line).unwrap_err();
        assert!(error.contains(part), "{task}: {error}");
    }
}

#[test]
fn chance_is_the_mean_over_items() {
    let item = |count: usize| Item::choice("q", &vec!["a".to_owned(); count], 0).unwrap();
    let values = [(Metric::Acc, 1.0), (Metric::AccNorm, 0.0), (Metric::Acc, 0.0), (Metric::AccNorm, 0.0)];
    let report = Task::named("arc_easy").unwrap().report(&[item(4), item(2)], &values);
    assert_eq!(report.items, 2);
    assert_eq!(
        report.metrics.iter().map(|m| (m.metric, m.estimate.value)).collect::<Vec<_>>(),
        [(Metric::Acc, 0.5), (Metric::AccNorm, 0.0)]
    );
    assert_eq!(report.metrics[0].chance, Some(0.375));
}
