//! The commands for real devices, and their exit status: 0 passed, 1 a check failed, 3 something is missing.

use std::process::ExitCode;

use shootdown_vfio::pci::Pci;

use crate::attach::{self, AttachOptions};
use crate::devices::{self, DevicesOptions};
use crate::{fail, output};

/// Prints the list.
pub(crate) fn devices(options: &DevicesOptions) -> ExitCode {
    match devices::list(&Pci::default()) {
        Ok(devices) => output(&devices, options.json, true),
        Err(error) => fail(&error, 3),
    }
}

/// Runs the check, and gives the device back whatever happens: Ctrl-C and SIGTERM are let pass, as a check ends by itself soon.
pub(crate) fn attach(options: &AttachOptions) -> ExitCode {
    // What cannot be given back, or be unmapped, is said in the log.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::ERROR)
        .with_writer(std::io::stderr)
        .init();
    let ignore = || eprintln!("interrupted: the check ends in a moment, then the device goes back");
    if let Err(error) = ctrlc::set_handler(ignore) {
        return fail(&format!("no handler for Ctrl-C could be set: {error}"), 3);
    }
    match attach::run(options) {
        Ok(attached) => output(&attached, options.json, attached.passed()),
        Err(error) => fail(&error, 3),
    }
}
