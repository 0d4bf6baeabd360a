//! Holds counts of instructions against the committed ones; `tests/bench/counts` runs it.
//!
//! Exit status: 0 nothing grew too much, 1 something did or the two do not name the same paths, 3 a file could not be read or written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde_json::Value;

/// Growth that needs a new committed figure.
const LIMIT: f64 = 5.0;
/// Operations of a benchmark.
const TIMES: f64 = 1_000.0;

const HEAD: &str = "\
# Instructions of one operation, as tests/bench/counts counted them; new ones are accepted by tests/bench/counts --accept.
";

/// Compares counts of instructions with the committed ones, and fails where one grew by more than 5 %.
#[derive(Debug, Parser)]
#[command(name = "counts", version)]
struct Options {
    /// What gungraun counted: one JSON object a line.
    counted: PathBuf,
    /// The committed figures.
    #[arg(long, default_value = "tests/bench/counts.txt")]
    committed: PathBuf,
    /// Writes what was counted to the committed figures.
    #[arg(long)]
    accept: bool,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{}: {source}", path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}, line {line}: neither a comment nor `NAME COUNT`: {text}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        text: String,
    },
    #[error("{}, line {line}: {reason}; tests/bench/counts makes this file", path.display())]
    Counted {
        path: PathBuf,
        line: usize,
        reason: String,
    },
}

/// Instructions of one operation, by the path's name.
type Counts = BTreeMap<String, f64>;

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}

fn counted(path: &Path) -> Result<Counts, Error> {
    let mut counts = Counts::new();
    for (nth, text) in read(path)?.lines().enumerate() {
        let (name, count) = one(text).map_err(|reason| Error::Counted {
            path: path.to_owned(),
            line: nth + 1,
            reason,
        })?;
        counts.insert(name, count);
    }
    Ok(counts)
}

fn one(text: &str) -> Result<(String, f64), String> {
    let summary: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let part = |name: &str| summary[name].as_str().unwrap_or_default();
    // `old`, which may stand beside it, is of an earlier run.
    let new = summary.pointer("/profiles/0/data/total/metrics/Ir/values/new");
    let count = new
        .and_then(Value::as_u64)
        .ok_or("it has no count of instructions")?;
    if count == 0 {
        return Err(format!("{}: nothing was counted", part("id")));
    }
    Ok((
        format!("{}/{}", part("function_name"), part("id")),
        count as f64 / TIMES,
    ))
}

fn committed(path: &Path) -> Result<Counts, Error> {
    let mut counts = Counts::new();
    for (nth, text) in read(path)?.lines().enumerate() {
        if text.starts_with('#') {
            continue;
        }
        let parts = text.split_once(' ');
        let count = parts.and_then(|(name, count)| Some((name, count.trim().parse().ok()?)));
        let (name, count) = count.ok_or_else(|| Error::Line {
            path: path.to_owned(),
            line: nth + 1,
            text: text.to_owned(),
        })?;
        counts.insert(name.to_owned(), count);
    }
    Ok(counts)
}

/// Prints what moved; false if it may not have.
fn compare(committed: &Counts, counted: &Counts) -> bool {
    let (mut good, mut moved) = (true, 0);
    for (name, now) in counted {
        let Some(before) = committed.get(name) else {
            println!("{name:24} {now:>10.3}  has no committed figure");
            good = false;
            continue;
        };
        if now == before {
            continue;
        }
        moved += 1;
        let percent = (now / before - 1.0) * 100.0;
        let grew = percent > LIMIT;
        let verdict = if grew { "  GREW" } else { "" };
        println!("{name:24} {before:>10.3} -> {now:>10.3}  {percent:+.2} %{verdict}");
        good &= !grew;
    }
    for name in committed.keys().filter(|name| !counted.contains_key(*name)) {
        println!("{name:24} was not counted");
        good = false;
    }
    println!("{} paths counted, {moved} moved", counted.len());
    good
}

fn run(options: &Options) -> Result<bool, Error> {
    let counted = counted(&options.counted)?;
    if options.accept {
        let lines = counted
            .iter()
            .map(|(name, count)| format!("{name:24} {count:>10.3}\n"));
        let text = HEAD.to_owned() + &lines.collect::<String>();
        std::fs::write(&options.committed, text).map_err(|source| Error::File {
            path: options.committed.clone(),
            source,
        })?;
        println!(
            "{} figures written to {}",
            counted.len(),
            options.committed.display()
        );
        return Ok(true);
    }
    let good = compare(&committed(&options.committed)?, &counted);
    if !good {
        println!(
            "more than {LIMIT} % more instructions than committed: mend it, or commit new figures with the reason (tests/bench/counts --accept)"
        );
    }
    Ok(good)
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(3)
        }
    }
}
