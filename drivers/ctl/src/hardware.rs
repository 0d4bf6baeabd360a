//! The commands for real devices, and their exit status: 0 passed, 1 a check failed, 3 something is missing.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use serde::Serialize;
use shootdown_vfio::pci::Pci;

use crate::attach::{self, AttachOptions};
use crate::devices::{self, DevicesOptions};

/// Prints the list.
pub(crate) fn devices(options: &DevicesOptions) -> ExitCode {
    match devices::list(&Pci::default()) {
        Ok(devices) => print(&devices, options.json, true),
        Err(error) => fail(&error),
    }
}

/// Runs the check, and gives the device back whatever happens: Ctrl-C is let pass, as a check ends by itself soon.
pub(crate) fn attach(options: &AttachOptions) -> ExitCode {
    // What cannot be given back, or be unmapped, is said in the log.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::ERROR)
        .with_writer(std::io::stderr)
        .init();
    let ignore = || eprintln!("interrupted: the check ends in a moment, then the device goes back");
    if let Err(error) = ctrlc::set_handler(ignore) {
        return fail(&format!("no handler for Ctrl-C could be set: {error}"));
    }
    match attach::run(options) {
        Ok(attached) => print(&attached, options.json, attached.passed()),
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn Display) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(3)
}

/// Whoever has closed the output did not want the rest.
fn print(report: &(impl Display + Serialize), json: bool, passed: bool) -> ExitCode {
    let text = if json {
        match serde_json::to_string(report) {
            Ok(text) => text,
            Err(error) => return fail(&format!("the report could not be written: {error}")),
        }
    } else {
        report.to_string().trim_end().to_owned()
    };
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            fail(&format!("the report could not be written: {error}"))
        }
        _ if passed => ExitCode::SUCCESS,
        _ => ExitCode::from(1),
    }
}
