//! The planted-bug table: every race of the catalogue, the guard against it, and the check that notices when that guard is taken out.
//!
//! Builds what the checks need, runs each first with every guard in place, where it has to pass, and then without the one, where
//! it has to fail by itself: by what it asserts, by a deadlock that the model checker reports, by the allocator's trap, by the
//! oracle. A check that only runs out of time has caught nothing.
//!
//! Guards of core are taken out by name, through `SHOOTDOWN_PLANTED`, in builds with `--cfg planted`; those of drivers and model by
//! plants in their configuration or by a wrapper that lies, in a test of its own that passes only if the bug is found.
//!
//! Exit status: 0 every bug was caught, 1 one was not, 2 wrong usage, 3 something could not be built or run.

mod build;
mod entry;
mod error;
mod examine;
mod report;
mod run;
mod table;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::Parser;

use crate::error::Error;
use crate::examine::Examiner;
use crate::report::{Row, Verdict};
use crate::table::TABLE;

/// Takes out one guard after the other, and says which check has noticed.
#[derive(Debug, Parser)]
#[command(
    name = "races",
    version,
    after_help = "Exit status: 0 every bug was caught, 1 one was not, 2 wrong usage, 3 something could not be built or run."
)]
struct Options {
    /// Prints one JSON list, an object for each guard.
    #[arg(long)]
    json: bool,
    /// Leaves out the runs of the `shootdown` command and the virtual machine: about three minutes, builds included.
    #[arg(long)]
    fast: bool,
    /// Only the guards against this race, or the one with this plant.
    #[arg(value_name = "RACE")]
    only: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match table(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Whether everything was caught.
fn table(options: &Options) -> Result<bool, Error> {
    let wanted = |text: &str| match &options.only {
        Some(only) => text.eq_ignore_ascii_case(only),
        None => true,
    };
    let entries: Vec<_> = TABLE
        .iter()
        .filter(|entry| wanted(entry.race) || wanted(entry.plant))
        .filter(|entry| !(options.fast && entry.check.is_slow()))
        .collect();
    if entries.is_empty() {
        return Err(Error::NoSuchRace {
            name: options.only.clone().unwrap_or_default(),
        });
    }
    let mut examiner = Examiner::new()?;
    let mut rows = Vec::new();
    if !options.json {
        println!("{}", Row::HEAD);
    }
    for entry in entries {
        let row = Row::new(entry, examiner.examine(entry)?);
        if !options.json {
            println!("{row}");
        }
        rows.push(row);
    }
    if options.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&rows).map_err(Error::Report)?
        );
    } else {
        println!("\n{}", report::summary(&rows));
    }
    Ok(!rows.iter().any(|row| row.verdict == Verdict::NotCaught))
}
