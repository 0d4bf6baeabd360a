//! The `shootdown` command: runs the whole framework against model hardware, and says whether any device access ever went
//! through a stale translation.
//!
//! Exit status: 0 passed, 1 a violation was found, 2 wrong usage, 3 this machine lacks something.

mod accelerator;
mod attach;
mod audit;
mod campaign;
mod churn;
mod devices;
mod faults;
mod finish;
mod foreign;
mod gru;
mod hardware;
mod options;
mod plant;
mod races;
mod recovery;
mod report;
mod run;
mod services;
mod shared;
mod sim;
mod soak;
mod sources;
mod status;
mod trace;
mod worker;

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use serde::Serialize;

use crate::faults::Fault;
use crate::options::{Cli, Command, GruCommand, Options, PlantsOptions};
use crate::plant::Plant;
use crate::status::Snapshot;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let simulates = match &cli.command {
        Some(Command::Run(options)) => options.sim,
        Some(_) => false,
        None => cli.run.sim,
    };
    if cfg!(sim) && !simulates {
        return fail(
            &"this is the build that simulates: it does `run --sim`, and nothing else",
            2,
        );
    }
    match cli.command {
        Some(Command::Run(options)) => run(&options),
        Some(Command::Plants(options)) => plants(&options),
        Some(Command::Devices(options)) => hardware::devices(&options),
        Some(Command::Attach(options)) => hardware::attach(&options),
        Some(Command::Sources(options)) => match sources::run(&options) {
            Ok((sources, json)) => output(&sources, json, true),
            Err(error) => fail(&error, 3),
        },
        Some(Command::Gru(GruCommand::Status(options))) => match Snapshot::ask(&options) {
            Ok(snapshot) => output(&snapshot, options.json, true),
            Err(error) => fail(&error, error.exit_code()),
        },
        None => run(&cli.run),
    }
}

fn run(options: &Options) -> ExitCode {
    if options.plant.as_deref() == Some("list") {
        let lines = Plant::ALL.map(|plant| {
            let (name, race, meaning) = (plant.name(), plant.race(), plant.meaning());
            format!("{name:<22} {meaning} ({race})")
        });
        return print(&lines.join("\n"), true);
    }
    if options.faults.as_deref() == Some("list") {
        let lines = Fault::ALL.map(|fault| format!("{:<15} {}", fault.name(), fault.meaning()));
        return print(&lines.join("\n"), true);
    }
    let faults = match options.faults.as_deref().map(Fault::by_names).transpose() {
        Ok(faults) => faults.unwrap_or_default(),
        Err(error) => return fail(&error, 2),
    };
    let plant = match options.plant.as_deref().map(Plant::by_name).transpose() {
        Ok(plant) => plant,
        Err(error) => return fail(&error, 2),
    };
    if options.sim {
        return simulate(options, plant, &faults);
    }
    let level = match &options.faults {
        _ if options.verbose => "shootdown=debug,info",
        // What comes of faults is in the report.
        Some(_) => "off",
        None => "error",
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .init();
    let interrupted = match on_interrupt() {
        Ok(interrupted) => interrupted,
        Err(code) => return code,
    };
    match run::run(options, plant, &faults, &interrupted) {
        Ok((report, trace)) => {
            let code = output(&report, options.json, report.passed());
            match trace {
                Ok(()) => code,
                Err(error) => fail(&error, error.exit_code()),
            }
        }
        Err(error) => fail(&error, error.exit_code()),
    }
}

/// By another build.
#[cfg(not(sim))]
fn simulate(_: &Options, _: Option<Plant>, _: &[Fault]) -> ExitCode {
    match sim::launch() {
        Ok(never) => match never {},
        Err(error) => fail(&error, 3),
    }
}

#[cfg(sim)]
fn simulate(options: &Options, plant: Option<Plant>, faults: &[Fault]) -> ExitCode {
    let interrupted = match on_interrupt() {
        Ok(interrupted) => interrupted,
        Err(code) => return code,
    };
    match sim::run(options, plant, faults, &interrupted) {
        Ok(exploration) => output(&exploration, options.json, exploration.passed()),
        Err(error) => fail(&error, error.exit_code()),
    }
}

fn plants(options: &PlantsOptions) -> ExitCode {
    let interrupted = match on_interrupt() {
        Ok(interrupted) => interrupted,
        Err(code) => return code,
    };
    match campaign::run(options, &interrupted) {
        Ok(campaign) => output(&campaign, options.json, campaign.passed()),
        Err(error) => fail(&error, 3),
    }
}

/// A flag that Ctrl-C sets.
fn on_interrupt() -> Result<Arc<AtomicBool>, ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    // Relaxed: a flag that carries nothing else.
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .map_err(|error| fail(&format!("no handler for Ctrl-C could be set: {error}"), 3))?;
    Ok(interrupted)
}

fn fail(error: &dyn Display, code: u8) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(code)
}

/// Prints a report, and gives its exit status.
fn output(report: &(impl Display + Serialize), json: bool, passed: bool) -> ExitCode {
    if !json {
        return print(report.to_string().trim_end(), passed);
    }
    match serde_json::to_string(report) {
        Ok(text) => print(&text, passed),
        Err(error) => fail(&format!("the report could not be written: {error}"), 3),
    }
}

/// Prints to standard output. Whoever has closed it did not want the rest.
fn print(text: &str, passed: bool) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            fail(&format!("the report could not be written: {error}"), 3)
        }
        _ if passed => ExitCode::SUCCESS,
        _ => ExitCode::from(1),
    }
}
