//! The `shootdown` command: runs the whole framework against model hardware, and says whether any device access ever went
//! through a stale translation.
//!
//! Exit status: 0 passed, 1 a violation was found, 2 wrong usage, 3 this machine lacks something.

mod attach;
mod churn;
mod devices;
mod hardware;
mod options;
mod plant;
mod report;
mod run;
mod trace;
mod worker;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;

use crate::options::{Cli, Command};
use crate::plant::Plant;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = match cli.command {
        Some(Command::Run(options)) => options,
        Some(Command::Devices(options)) => return hardware::devices(&options),
        Some(Command::Attach(options)) => return hardware::attach(&options),
        None => cli.run,
    };
    if options.plant.as_deref() == Some("list") {
        for plant in Plant::ALL {
            println!("{:<22} {}", plant.name(), plant.meaning());
        }
        return ExitCode::SUCCESS;
    }
    let plant = match options.plant.as_deref().map(Plant::by_name).transpose() {
        Ok(plant) => plant,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let level = if options.verbose {
        "shootdown=debug,info"
    } else {
        "error"
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .init();
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    // Relaxed: a flag that carries nothing else.
    if let Err(error) = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)) {
        eprintln!("error: no handler for Ctrl-C could be set: {error}");
        return ExitCode::from(3);
    }
    let report = match run::run(&options, plant, &interrupted) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    if options.json {
        match serde_json::to_string(&report) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("error: the report could not be written: {error}");
                return ExitCode::from(3);
            }
        }
    } else {
        print!("{report}");
    }
    if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    }
}
