//! What it costs that a foreign call is seen: the framework's source against the bare mechanism with an empty handler, side by side.
//!
//! A filter of system calls is permanent, and a process has one listener. So each contender is a child process that measures when it
//! is told to, one after the other, in many short turns; what counts is the ratio of two turns side by side, and the median of those
//! ratios. Absolute times are printed, and mean nothing on another machine.

mod bare;
mod contender;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use clap::{Parser, ValueEnum};
use serde::Serialize;
use thiserror::Error;

use crate::contender::Sample;

/// Compares each source with its bare mechanism.
#[derive(Debug, Parser)]
#[command(name = "cost", version)]
struct Options {
    /// Turns of each contender.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    turns: u32,
    /// Calls in a turn.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    calls: u32,
    /// Exit status 1 if a source costs more than so many times its bare mechanism, or a call that has nothing to do with memory more
    /// than 1.1 times what it costs beside that.
    #[arg(long, value_name = "RATIO")]
    at_most: Option<f64>,
    /// Prints one JSON list.
    #[arg(long)]
    json: bool,
    /// In the child: which contender it is.
    #[arg(long, hide = true)]
    child: Option<Contender>,
    /// In the child: another thread than the first unmaps.
    #[arg(long, hide = true)]
    later_thread: bool,
}

/// Who unmaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Contender {
    /// Nothing watches.
    Nothing,
    /// A filter and a supervisor that performs the call.
    BareUnotify,
    /// The same, and what correctness needs.
    DutifulUnotify,
    /// The framework's, with one registration.
    Unotify,
    /// As above: the addresses stay those of the arena.
    DutifulUnotifyInArena,
    /// The framework's, with one registration in the arena of its space.
    UnotifyInArena,
    /// A userfaultfd and a reader.
    BareUffd,
    /// The same, and what correctness needs.
    DutifulUffd,
    /// The framework's, with one registration.
    Uffd,
    /// As above: the addresses stay those of the arena.
    DutifulUffdInArena,
    /// The framework's, with one registration in the arena of its space.
    UffdInArena,
}

impl Contender {
    /// Whether what is unmapped lies in the arena of a space, which keeps its addresses.
    fn keeps_addresses(self) -> bool {
        matches!(
            self,
            Self::DutifulUnotifyInArena
                | Self::UnotifyInArena
                | Self::DutifulUffdInArena
                | Self::UffdInArena
        )
    }
}

#[derive(Debug, Error)]
enum Error {
    #[error("{0}")]
    Measure(#[from] contender::Error),
    #[error("the child that is {0:?} could not be run: {1}")]
    Child(Contender, std::io::Error),
    #[error("the child that is {0:?} ended: {1}")]
    Ended(Contender, String),
}

/// A source and its bare mechanism, by medians.
#[derive(Debug, Serialize)]
struct Row {
    source: Contender,
    /// Another thread than the first unmaps, whose calls unotify has to ask about.
    later_thread: bool,
    /// The munmap of a touched page of 4 KiB, in nanoseconds: nothing watches, the bare mechanism, the same with what correctness
    /// needs, the framework.
    munmap_ns: [f64; 4],
    /// Framework by bare mechanism.
    munmap_ratio: f64,
    /// Framework by what correctness needs.
    munmap_by_needed: f64,
    /// A system call that has nothing to do with memory, as above.
    unrelated_ns: [f64; 4],
    unrelated_ratio: f64,
    /// The munmap of a touched page that is not watched.
    elsewhere_ns: [f64; 4],
    elsewhere_ratio: f64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match options.child {
        Some(contender) => contender::run(contender, options.later_thread)
            .map(|()| true)
            .map_err(Error::from),
        None => compare(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(3)
        }
    }
}

/// A contender in a process of its own.
struct Process {
    contender: Contender,
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Process {
    fn start(contender: Contender, later_thread: bool) -> Result<Self, Error> {
        let failed = |error| Error::Child(contender, error);
        let name = contender.to_possible_value().expect("none is hidden");
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["--child", name.get_name()])
            .args(later_thread.then_some("--later-thread"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let ask = child.stdin.take().expect("piped");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Ok(Self {
            contender,
            child,
            ask,
            answers,
        })
    }

    /// One turn; medians.
    fn turn(&mut self, calls: u32) -> Result<Sample, Error> {
        let mut line = String::new();
        let asked = writeln!(self.ask, "{calls}").and_then(|()| self.answers.read_line(&mut line));
        asked.map_err(|error| Error::Child(self.contender, error))?;
        serde_json::from_str(&line).map_err(|_| Error::Ended(self.contender, line))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It would end by itself when its standard input does.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row(
    options: &Options,
    ([bare, needed, source], later_thread): ([Contender; 3], bool),
) -> Result<Row, Error> {
    let mut contenders = [Contender::Nothing, bare, needed, source]
        .into_iter()
        .map(|contender| Process::start(contender, later_thread))
        .collect::<Result<Vec<_>, _>>()?;
    let mut turns: Vec<Vec<Sample>> = Vec::new();
    // The first warms up.
    for turn in 0..=options.turns {
        let samples = contenders.iter_mut().map(|one| one.turn(options.calls));
        let samples = samples.collect::<Result<Vec<_>, _>>()?;
        if turn > 0 {
            turns.push(samples);
        }
    }
    let medians = |of: fn(&Sample) -> f64| {
        [0, 1, 2, 3].map(|nth| median(turns.iter().map(|turn| of(&turn[nth])).collect()))
    };
    // Framework by one of the others.
    let ratio = |nth: usize, of: fn(&Sample) -> f64| {
        let ratios = turns.iter().map(|turn| of(&turn[3]) / of(&turn[nth]));
        median(ratios.collect())
    };
    Ok(Row {
        source,
        later_thread,
        munmap_ns: medians(|sample| sample.munmap),
        munmap_ratio: ratio(1, |sample| sample.munmap),
        munmap_by_needed: ratio(2, |sample| sample.munmap),
        unrelated_ns: medians(|sample| sample.unrelated),
        unrelated_ratio: ratio(1, |sample| sample.unrelated),
        elsewhere_ns: medians(|sample| sample.elsewhere),
        elsewhere_ratio: ratio(1, |sample| sample.elsewhere),
    })
}

/// False if a source costs more than it may.
fn compare(options: &Options) -> Result<bool, Error> {
    use Contender::*;
    let rows = [
        ([BareUnotify, DutifulUnotify, Unotify], false),
        ([BareUnotify, DutifulUnotify, Unotify], true),
        ([BareUnotify, DutifulUnotifyInArena, UnotifyInArena], false),
        ([BareUffd, DutifulUffd, Uffd], false),
        ([BareUffd, DutifulUffdInArena, UffdInArena], false),
    ];
    let rows = rows.map(|contenders| row(options, contenders));
    let rows = rows.into_iter().collect::<Result<Vec<_>, _>>()?;
    if options.json {
        println!("{}", serde_json::to_string(&rows).expect("numbers"));
    } else {
        print(options, &rows);
    }
    let is_dear = |row: &Row, most| row.munmap_ratio > most || row.unrelated_ratio > UNRELATED;
    let dear = |most| rows.iter().any(|row| is_dear(row, most));
    Ok(!options.at_most.is_some_and(dear))
}

/// Calls that have nothing to do with memory pay for the filter, whoever has installed it.
const UNRELATED: f64 = 1.1;

fn print(options: &Options, rows: &[Row]) {
    println!(
        "medians of {} turns of {} calls, ns",
        options.turns, options.calls
    );
    println!(
        "                                        nothing    bare  needed  framework   by bare  by needed"
    );
    for row in rows {
        let name = row.source.to_possible_value().expect("none is hidden");
        let later = if row.later_thread { ", later" } else { "" };
        let name = name.get_name().replace('-', " ") + later;
        let needed = Some(row.munmap_by_needed);
        for (what, [nothing, bare, dutiful, framework], ratio, needed) in [
            ("munmap, watched", row.munmap_ns, row.munmap_ratio, needed),
            (
                "munmap, elsewhere",
                row.elsewhere_ns,
                row.elsewhere_ratio,
                None,
            ),
            (
                "an unrelated call",
                row.unrelated_ns,
                row.unrelated_ratio,
                None,
            ),
        ] {
            let needed = needed.map_or(String::new(), |ratio| format!("x{ratio:.2}"));
            println!(
                "{name:<17} {what:<20} {nothing:>8.0} {bare:>7.0} {dutiful:>7.0} {framework:>10.0}     x{ratio:.2}      {needed}"
            );
        }
    }
}
