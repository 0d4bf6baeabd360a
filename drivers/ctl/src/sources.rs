//! `shootdown sources`: what tells of foreign changes on this machine, what each source declares, what its self-test saw, what it costs.
//!
//! Each is tried in a child process: a filter of system calls is permanent, and a self-test forks.

use std::fmt;
use std::io;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};
use shootdown::{
    AddressSpace, Deadlines, Map, Needs, Notifier, Operation, ProcessMemory, Range, Seen, Sees,
    SelfTest, Source, Uffd, Unotify, Watched,
};
use thiserror::Error;

/// What `sources` does.
#[derive(Clone, Debug, Args)]
pub(crate) struct SourcesOptions {
    /// Prints the table as one JSON object.
    #[arg(long)]
    json: bool,
    /// In the child: tries this one, and prints what it found.
    #[arg(long, hide = true, value_name = "NAME")]
    probe: Option<String>,
}

/// Why there is no table.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("no child process could be started to try the source {0}: {1}")]
    Child(&'static str, io::Error),
    #[error("the child that tried the source {0} ended with {1}: {2}")]
    Ended(&'static str, std::process::ExitStatus, String),
    #[error("there is no source {0}: {known} are known", known = NAMES.join(", "))]
    Unknown(String),
    #[error("the source could not be tried: {0}")]
    Tried(Box<dyn std::error::Error>),
}

const NAMES: &[&str] = &[
    "managed",
    "uffd",
    "unotify",
    #[cfg(feature = "kvm")]
    "kvm-mmu",
];
const PAGE: u64 = 4096;
/// Operations of which the median is taken.
const ROUNDS: usize = 2000;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sources {
    sources: Vec<Report>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Report {
    name: String,
    /// Why it is not available.
    missing: Option<String>,
    cost: Option<Cost>,
    operations: Vec<Row>,
}

/// Medians, in nanoseconds, all in one run.
#[derive(Debug, Serialize, Deserialize)]
struct Cost {
    /// The munmap of a touched 4 KiB page that is not watched.
    munmap_unwatched_ns: f64,
    /// And of one that is, with one handler registered.
    munmap_watched_ns: f64,
    ratio: f64,
    /// A system call that has nothing to do with memory, before the source was started, and afterwards.
    unrelated_before_ns: f64,
    unrelated_after_ns: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    operation: String,
    declares: String,
    seen: String,
    /// What a driver can rely on.
    counts: String,
}

/// Prints the table, or the one report that a child was asked for.
pub(crate) fn run(options: &SourcesOptions) -> Result<(Sources, bool), Error> {
    if let Some(name) = &options.probe {
        let sources = vec![probe(name)?];
        return Ok((Sources { sources }, true));
    }
    let sources = NAMES.iter().copied().map(child).collect::<Result<_, _>>()?;
    Ok((Sources { sources }, options.json))
}

fn child(name: &'static str) -> Result<Report, Error> {
    let output = std::env::current_exe()
        .and_then(|program| {
            Command::new(program)
                .args(["sources", "--probe", name])
                .output()
        })
        .map_err(|error| Error::Child(name, error))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let report: Option<Sources> = serde_json::from_slice(&output.stdout).ok();
    report
        .and_then(|mut sources| sources.sources.pop())
        .ok_or(Error::Ended(name, output.status, said))
}

/// The handler whose presence is measured.
struct Registered;

impl Notifier for Registered {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }
}

fn probe(name: &str) -> Result<Report, Error> {
    let source: Option<Arc<dyn Source>> = match name {
        "managed" => None,
        "uffd" => Some(Arc::new(Uffd::new())),
        "unotify" => Some(Arc::new(Unotify::new())),
        #[cfg(feature = "kvm")]
        "kvm-mmu" => Some(Arc::new(shootdown_kvm::KvmMmu::new())),
        other => return Err(Error::Unknown(other.to_owned())),
    };
    let failed = |error: Box<dyn std::error::Error>| Error::Tried(error);
    let memory = ProcessMemory::reserve(64 << 20).map_err(|error| failed(error.into()))?;
    let memory = Arc::new(memory);
    let arena = shootdown::Memory::arena(&*memory);
    let space = AddressSpace::managed(memory, Deadlines::default());
    let before = unrelated();
    let watched = match source {
        None => None,
        Some(source) => match space.watch_tested(source, arena, SelfTest::Thorough) {
            Ok(watched) => Some(watched),
            Err(error) => {
                return Ok(Report {
                    name: name.to_owned(),
                    missing: Some(error.to_string()),
                    cost: None,
                    operations: Vec::new(),
                });
            }
        },
    };
    let cost = cost(&space, watched.is_some(), before).map_err(failed)?;
    Ok(Report {
        name: name.to_owned(),
        missing: None,
        cost: Some(cost),
        operations: watched.as_ref().map_or_else(managed, rows),
    })
}

/// The space's own operations, which are not tried here: they are what the tests of this project are about.
fn managed() -> Vec<Row> {
    let all = Sees::TOLD | Sees::BEFORE | Sees::BARRIER | Sees::END;
    let row = |operation: &str| Row {
        operation: format!("its own {operation}"),
        declares: all.to_string(),
        seen: "by construction".to_owned(),
        counts: all.to_string(),
    };
    ["unmap", "discard", "protect", "remap"].map(row).into()
}

fn rows(watched: &Watched) -> Vec<Row> {
    let row = |tried: &shootdown::Tried| Row {
        operation: tried.operation.to_string(),
        declares: tried.declares.to_string(),
        seen: match &tried.seen {
            Seen::Told(seen) => seen.to_string(),
            Seen::NotTried(reason) => format!("not tried: {reason}"),
            _ => "unknown".to_owned(),
        },
        counts: tried.counts().to_string(),
    };
    watched.self_test().iter().map(row).collect()
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// The median of a system call that has nothing to do with memory, in nanoseconds.
fn unrelated() -> f64 {
    const BATCH: u32 = 100;
    let sample = |_| {
        let started = Instant::now();
        for _ in 0..BATCH {
            // SAFETY: no arguments, and no effect.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        started.elapsed().as_nanos() as f64 / f64::from(BATCH)
    };
    median((0..ROUNDS / 10).map(sample).collect())
}

/// Maps fresh pages over the range, raw, or where the kernel likes; the address.
fn map_raw(at: Option<Range>) -> io::Result<usize> {
    let (start, fixed) = match at {
        Some(range) => (range.start().get() as usize, libc::MAP_FIXED),
        None => (0, 0),
    };
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
    // SAFETY: a new mapping, or one over a page of the arena that nobody refers to.
    let at = unsafe { libc::mmap(start as *mut _, PAGE as usize, rights, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at as usize)
}

/// Touches the page at `at` and takes it away: how long the latter took, in nanoseconds.
fn unmap_raw(at: usize) -> io::Result<f64> {
    // SAFETY: mapped by the caller.
    unsafe { std::ptr::write_volatile(at as *mut u8, 1) };
    let started = Instant::now();
    // SAFETY: mapped by the caller, and nobody refers to it.
    let result = unsafe { libc::munmap(at as *mut _, PAGE as usize) };
    let took = started.elapsed().as_nanos() as f64;
    match result {
        0 => Ok(took),
        _ => Err(io::Error::last_os_error()),
    }
}

fn cost(
    space: &AddressSpace,
    foreign: bool,
    before: f64,
) -> Result<Cost, Box<dyn std::error::Error>> {
    let buffer = space.map(Map::anonymous(PAGE))?;
    let (mut bare, mut with) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        bare.push(unmap_raw(map_raw(None)?)?);
        if foreign {
            let at = map_raw(Some(buffer))?;
            // What was mapped anew is watched once somebody is registered there.
            let _registration = space.register(buffer, Arc::new(Registered), &[])?;
            with.push(unmap_raw(at)?);
            continue;
        }
        if round > 0 {
            space.map(Map::anonymous(PAGE).at(buffer.start()))?;
        }
        let _registration = space.register(buffer, Arc::new(Registered), &[])?;
        // SAFETY: mapped just now, and nobody else's.
        unsafe { std::ptr::write_volatile(buffer.start().get() as *mut u8, 1) };
        let started = Instant::now();
        space.unmap(buffer)?;
        with.push(started.elapsed().as_nanos() as f64);
    }
    let (bare, with) = (median(bare), median(with));
    Ok(Cost {
        munmap_unwatched_ns: bare,
        munmap_watched_ns: with,
        ratio: with / bare,
        unrelated_before_ns: before,
        unrelated_after_ns: unrelated(),
    })
}

impl Report {
    fn row(&self, operation: &str) -> Option<&Row> {
        self.operations
            .iter()
            .find(|row| row.operation == operation)
    }
}

impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for report in &self.sources {
            match (&report.missing, &report.cost) {
                (Some(reason), _) => writeln!(f, "{:<8} not available: {reason}", report.name)?,
                (None, Some(cost)) => writeln!(
                    f,
                    "{:<8} available; munmap of a touched page {:.0} ns, {:.0} ns without: x{:.2}; \
                     an unrelated call {:.0} ns, {:.0} ns before",
                    report.name,
                    cost.munmap_watched_ns,
                    cost.munmap_unwatched_ns,
                    cost.ratio,
                    cost.unrelated_after_ns,
                    cost.unrelated_before_ns,
                )?,
                (None, None) => writeln!(f, "{:<8} available", report.name)?,
            }
        }
        let foreign: Vec<_> = self
            .sources
            .iter()
            .filter(|report| report.row(Operation::Munmap.name()).is_some())
            .collect();
        write!(f, "\n{:<24}", "seen of foreign calls")?;
        for report in &foreign {
            write!(f, " {:<22}", report.name)?;
        }
        writeln!(f)?;
        for operation in Operation::ALL {
            write!(f, "{:<24}", operation.name())?;
            for report in &foreign {
                let row = report.row(operation.name());
                write!(f, " {:<22}", row.map_or("-", |row| row.counts.as_str()))?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "\nwhere the self-test saw something else than what is declared:"
        )?;
        for report in &foreign {
            for row in report
                .operations
                .iter()
                .filter(|row| row.seen != row.declares)
            {
                let Row {
                    operation,
                    declares,
                    seen,
                    ..
                } = row;
                let name = &report.name;
                writeln!(
                    f,
                    "  {name}: {operation}: declares \"{declares}\", seen \"{seen}\""
                )?;
            }
        }
        Ok(())
    }
}
