//! Runs the VM tier: provides QEMU and a kernel, builds the guest program, boots it, and holds what it says against what its
//! IOMMU did.
//!
//! Exit status: 0 every check held, 1 one did not, 2 wrong usage, 3 this machine lacks something, 130 interrupted.

mod apt;
mod cache;
mod error;
mod initramfs;
mod process;
mod program;
mod qemu;
mod report;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Parser;

use crate::error::Error;
use crate::report::Report;

/// Real Linux VFIO in a QEMU guest with an emulated IOMMU: every check of the guest, and the witness that reads the IOMMU's own trace.
///
/// Nothing is installed and no privilege is needed. The first run fetches about 64 MB of Debian packages through apt-get and
/// unpacks them into a cache: $SHOOTDOWN_VM_CACHE, else $XDG_CACHE_HOME/shootdown-vm, else ~/.cache/shootdown-vm.
#[derive(Debug, Parser)]
#[command(name = "vm", version)]
struct Options {
    /// Kills the guest when it has run for so many seconds.
    #[arg(long, default_value_t = 90, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    deadline: u64,
    /// Kills the guest when it has said nothing for so many seconds.
    #[arg(long, default_value_t = 20, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    silence: u64,
    /// Keeps the guest's console and the IOMMU's trace in this file (without it the last run's is in the cache, as last.log).
    #[arg(long, value_name = "FILE")]
    keep_log: Option<PathBuf>,
    /// Writes what the `shootdown` command printed in the guest to files in this directory.
    #[arg(long, value_name = "DIR")]
    save_output: Option<PathBuf>,
    /// Prints the report as one JSON object.
    #[arg(long)]
    json: bool,
    /// The Debian archive to fetch from, where apt's own sources name none.
    #[arg(long, value_name = "URI")]
    archive: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(error) = ctrlc::set_handler(|| process::INTERRUPTED.store(true, Ordering::Relaxed)) {
        eprintln!("error: no handler for Ctrl-C could be set: {error}");
        return ExitCode::from(3);
    }
    match tier(&options) {
        Ok(report) => {
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
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn tier(options: &Options) -> Result<Report, Error> {
    let (machine, programs) = std::thread::scope(|scope| {
        let programs = scope.spawn(program::build);
        let machine = cache::provide(options.archive.as_deref())?;
        let programs = programs
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((machine, programs))
    })?;
    let work = cache::Scratch::new(&machine.root)?;
    let initramfs = work.path().join("initramfs");
    initramfs::write(&initramfs, &programs, &machine.modules)?;
    let disks = ["disk", "slow"].map(|name| work.path().join(name));
    for disk in &disks {
        let file = std::fs::File::create(disk).and_then(|file| file.set_len(qemu::DISK_BYTES));
        error::at(disk, file)?;
    }
    // Two runs at once do not write to one file.
    let log = match &options.keep_log {
        Some(file) => file.clone(),
        None => work.path().join("log"),
    };
    let boot = qemu::Boot {
        machine: &machine,
        initramfs: &initramfs,
        disks: [&disks[0], &disks[1]],
    };
    let limits = run::Limits {
        whole: Duration::from_secs(options.deadline),
        silence: Duration::from_secs(options.silence),
    };
    let mut report = run::run(&boot, &log, limits)?;
    if let Some(directory) = &options.save_output {
        report.save(directory)?;
    }
    if options.keep_log.is_none() {
        let last = machine.root.join("last.log");
        error::at(&last, std::fs::rename(&log, &last))?;
        report.log = last;
    }
    Ok(report)
}
