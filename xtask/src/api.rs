//! `cargo xtask api`: the public interface of each crate, in one file beside its manifest, so that a change of it shows in a diff.
//!
//! Taken from the pages that rustdoc makes: every public item's declaration, its own functions, and the traits it has.

use crate::shell::{self, cargo, command, output, root};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only compares: fails where a file is not what the crate's interface is.
    #[arg(long)]
    check: bool,
}

const CRATES: [&str; 6] = ["moe-core", "moe-kernels", "moe-parallel", "moe-models", "moe-compress", "moe-serve"];

pub(crate) fn run(args: &Args) -> Result<()> {
    document()?;
    if args.check { check() } else { write() }
}

/// Makes the documentation, in which a warning is an error.
pub(crate) fn document() -> Result<()> {
    shell::run(cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}

fn write() -> Result<()> {
    for name in CRATES {
        let path = root().join(name).join("API.txt");
        let text = interface(name)?;
        println!("{}: {} lines", path.display(), text.lines().count());
        std::fs::write(path, text)?;
    }
    Ok(())
}

/// Compares the files with the documentation that was made last.
pub(crate) fn check() -> Result<()> {
    let mut changed = Vec::new();
    for name in CRATES {
        let path = root().join(name).join("API.txt");
        let kept = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if kept.lines().next() != Some(head()?.as_str()) {
            println!("{name}: API.txt was made by another rustdoc, whose pages differ; not compared");
            continue;
        }
        let now = interface(name)?;
        if kept != now {
            for line in difference(&kept, &now) {
                println!("{name}: {line}");
            }
            changed.push(name);
        }
    }
    ensure!(
        changed.is_empty(),
        "the public interface of {} is not what API.txt says; if that is meant, run `cargo xtask api` and commit the files",
        changed.join(", ")
    );
    Ok(())
}

/// Lines that are in one of both alone.
fn difference<'a>(kept: &'a str, now: &'a str) -> Vec<String> {
    let mut counts: BTreeMap<&str, i32> = BTreeMap::new();
    kept.lines().for_each(|line| *counts.entry(line).or_default() -= 1);
    now.lines().for_each(|line| *counts.entry(line).or_default() += 1);
    let sign = |count: i32| if count < 0 { '-' } else { '+' };
    counts.into_iter().filter(|(_, count)| *count != 0).map(|(line, count)| format!("{}{line}", sign(count))).collect()
}

/// Which rustdoc, and so which form of pages.
fn head() -> Result<String> {
    Ok(format!("# {}", output(&mut command("rustdoc", &["--version"]))?.trim()))
}

fn interface(name: &str) -> Result<String> {
    let module = name.replace('-', "_");
    let dir = root().join("target/doc").join(&module);
    let all = page(&dir.join("all.html"))?;
    let mut items: Vec<&str> = parts(&all, "<a href=\"", "\"").collect();
    items.retain(|link| link.ends_with(".html") && !link.starts_with("..") && !link.contains(':'));
    items.sort_unstable();
    let mut text = head()? + "\n";
    for link in items {
        let path = link.trim_end_matches(".html").replace('/', "::");
        // `ops::trait.MoeOps`: the kind stands in the declaration too.
        let (before, item) = path.rsplit_once("::").map_or(("", path.as_str()), |(before, item)| (before, item));
        let item = item.split_once('.').map_or(item, |(_, item)| item);
        let path = [module.as_str(), before, item].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
        let _ = write!(text, "{}\n{}", path.join("::"), item_text(&page(&dir.join(link))?));
    }
    Ok(text)
}

fn page(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{}; make the documentation first", path.display()))
}

/// What one page says of its item.
fn item_text(html: &str) -> String {
    let mut text = String::new();
    // What every type has is no news.
    let html = cut(html, "id=\"synthetic-implementations\"");
    let html = cut(html, "id=\"blanket-implementations\"");
    if let Some(declaration) = parts(html, "<pre class=\"rust item-decl\"><code>", "</code></pre>").next() {
        let _ = writeln!(text, "    {}", plain(declaration));
    }
    let (own, traits) = html.split_once("id=\"trait-implementations\"").unwrap_or((html, ""));
    // A trait's declaration holds its functions; those below repeat it, or are of whoever implements it.
    if let Some((_, own)) = own.split_once("id=\"implementations\"") {
        for header in parts(own, "class=\"code-header\">", "</h") {
            let header = plain(header);
            let indent = if header.starts_with("impl") { "    " } else { "        " };
            let _ = writeln!(text, "{indent}{header}");
        }
    }
    for header in parts(traits, "<h3 class=\"code-header\">", "</h3>") {
        let _ = writeln!(text, "    {}", plain(header));
    }
    text
}

fn cut<'a>(html: &'a str, end: &str) -> &'a str {
    html.split_once(end).map_or(html, |(before, _)| before)
}

/// What lies between each `begin` and the next `end`.
fn parts<'a>(html: &'a str, begin: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
    html.split(begin).skip(1).filter_map(move |rest| Some(rest.split_once(end)?.0))
}

/// Without tags, on one line.
fn plain(html: &str) -> String {
    let mut text = String::new();
    let mut rest = html;
    while let Some((before, tag)) = rest.split_once('<') {
        text.push_str(before);
        rest = tag.split_once('>').map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let entities = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&#x27;", "'"), ("&nbsp;", " ")];
    let text = entities.iter().fold(text, |text, (entity, sign)| text.replace(entity, sign));
    text.replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_becomes_its_declaration_functions_and_traits() {
        let html = r##"<pre class="rust item-decl"><code>pub struct <a href="x">A</a>&lt;T&gt; {
            <span>/* private fields */</span> }</code></pre><div id="implementations"></div><h3 class="code-header">impl&lt;T&gt;
            A&lt;T&gt;</h3><h4 class="code-header">pub fn <a>new</a>(&amp;self) -&gt; u8</h4><div id="trait-implementations">
            <h3 class="code-header">impl Clone for A</h3><h4 class="code-header">fn clone()</h4>
            <div id="synthetic-implementations"><h3 class="code-header">impl Send for A</h3>"##;
        let want = "    pub struct A<T> { /* private fields */ }\n    impl<T> A<T>\n        pub fn new(&self) -> u8\n    impl Clone for A\n";
        assert_eq!(item_text(html), want);
        assert_eq!(difference("a\nb\nb\n", "b\nc\n"), ["-a", "-b", "+c"]);
    }
}
