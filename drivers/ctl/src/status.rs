//! `shootdown gru status`: what the GRUs of a run that is at work are doing just now.
//!
//! A run listens at a Unix socket in `$XDG_RUNTIME_DIR` (where that names no place, in the folder for temporary files), named by its process,
//! and gives whoever connects one JSON object. It does so between two looks at its threads, so that nothing is added to it but a
//! descriptor. Who is gone refuses connections, and its socket is removed by whoever notices.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use shootdown_gru::{ContextStatus, Gru, GruError};
use shootdown_hw_model::gru::Model;
use thiserror::Error;

/// What `gru status` does.
#[derive(Clone, Debug, Args)]
pub(crate) struct StatusOptions {
    /// The process of the run, where there are several.
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// Prints one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Why there is no status.
#[derive(Debug, Error)]
pub(crate) enum StatusError {
    #[error(
        "no run is at work (there is no live shootdown-*.sock in {folder}): start one with `shootdown run`"
    )]
    NoRun { folder: String },
    #[error(
        "process {pid} is no run that is at work (of those there are: {live}): leave --pid out, or name another"
    )]
    NoSuchRun { pid: u32, live: String },
    #[error("several runs are at work: say which with --pid ({live})")]
    Several { live: String },
    #[error("run {pid} did not answer: {error}")]
    NoAnswer { pid: u32, error: std::io::Error },
    #[error("run {pid} is of another version: {error}")]
    NotUnderstood { pid: u32, error: serde_json::Error },
}

impl StatusError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoSuchRun { .. } | Self::Several { .. } => 2,
            Self::NoRun { .. } | Self::NoAnswer { .. } | Self::NotUnderstood { .. } => 3,
        }
    }
}

/// For one answer, on either side.
const PATIENCE: Duration = Duration::from_secs(2);

fn folder() -> PathBuf {
    // Empty or relative it does not count, as its specification says: a run and whoever looks at it may be started in different places.
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    named
        .filter(|folder| folder.is_absolute())
        .unwrap_or_else(std::env::temp_dir)
}

fn socket(pid: u32) -> PathBuf {
    folder().join(format!("shootdown-{pid}.sock"))
}

/// Removes what a run that is ended from outside, or ends itself where nothing is dropped, would leave.
pub(crate) fn forget(pid: u32) {
    // Whoever looks for runs removes it else.
    let _ = std::fs::remove_file(socket(pid));
}

/// A run's end of it.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// # Errors
    /// The socket could not be made.
    pub(crate) fn open() -> std::io::Result<Self> {
        let path = socket(std::process::id());
        // One of an earlier process with this number.
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(error);
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Answers whoever asks just now.
    pub(crate) fn answer(&self, snapshot: impl Fn() -> Result<Snapshot, GruError>) {
        while let Ok((mut stream, _)) = self.listener.accept() {
            let text = match snapshot() {
                Ok(snapshot) => serde_json::to_string(&snapshot).unwrap_or_default(),
                Err(error) => {
                    tracing::warn!(%error, "no status");
                    continue;
                }
            };
            // Who does not read it does not get it.
            let _ = (stream.set_nonblocking(false))
                .and_then(|()| stream.set_write_timeout(Some(Duration::from_millis(100))))
                .and_then(|()| stream.write_all(text.as_bytes()));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whoever looks for runs removes it else.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A chiplet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Chiplet {
    name: String,
    blade: u32,
    condition: String,
    segments: usize,
    contexts: Vec<Context>,
    asids: u64,
    generation: u32,
    next_asid: u32,
    wraps: u64,
    tlb_entries: usize,
    tlb_capacity: usize,
    purges_open: u64,
    pending_faults: usize,
    instructions: u64,
    misses: u64,
}

/// A loaded context.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Context {
    index: usize,
    /// None for one of the driver's own.
    space: Option<u64>,
    asid: u32,
    control_blocks: usize,
    data_bytes: usize,
    misses: String,
    loaded_ms: u64,
    pending_faults: usize,
    leaked: bool,
    misses_user: u64,
    misses_interrupt: u64,
    misses_polled: u64,
    drop_ins: u64,
    stolen: u64,
    steals: u64,
}

impl From<&ContextStatus> for Context {
    fn from(one: &ContextStatus) -> Self {
        Self {
            index: one.index,
            space: one.space,
            asid: one.asid,
            control_blocks: one.control_blocks,
            data_bytes: one.data_bytes,
            misses: format!("{:?}", one.misses),
            loaded_ms: one.loaded_for.as_millis() as u64,
            pending_faults: one.pending_faults,
            leaked: one.leaked,
            misses_user: one.stats.misses_user,
            misses_interrupt: one.stats.misses_interrupt,
            misses_polled: one.stats.misses_polled,
            drop_ins: one.stats.drop_ins,
            stolen: one.stats.stolen,
            steals: one.stats.steals,
        }
    }
}

/// One operation of handles.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Operation {
    name: String,
    count: u64,
    average_ns: u64,
    max_ns: u64,
    failed: u64,
}

/// All operations of a driver's handles.
pub(crate) fn operations(gru: &Gru) -> Vec<Operation> {
    let operations = gru.operations().into_iter().map(|one| Operation {
        name: one.name.to_owned(),
        count: one.count,
        average_ns: one.average,
        max_ns: one.max,
        failed: one.failed,
    });
    operations.collect()
}

/// What a run's GRUs are doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pid: u32,
    seconds: f64,
    chiplets: Vec<Chiplet>,
    operations: Vec<Operation>,
    counters: Vec<(String, u64)>,
}

impl Snapshot {
    /// # Errors
    /// A chiplet is gone.
    pub(crate) fn new(gru: &Gru, model: &Model, seconds: f64) -> Result<Self, GruError> {
        let status = gru.status()?;
        let chiplets = status.iter().zip(model.chiplets()).map(|(one, hardware)| {
            let counts = hardware.counts();
            Chiplet {
                name: one.name.clone(),
                blade: one.blade,
                condition: format!("{:?}", one.condition).to_lowercase(),
                segments: one.segments,
                contexts: one.contexts.iter().map(Context::from).collect(),
                asids: one.asids,
                generation: one.generation,
                next_asid: one.next_asid,
                wraps: one.wraps,
                tlb_entries: hardware.tlb_entries().len(),
                tlb_capacity: hardware.config().tlb_entries,
                purges_open: one.purges_open,
                pending_faults: one.contexts.iter().map(|one| one.pending_faults).sum(),
                instructions: counts.instructions,
                misses: counts.misses + counts.modify_misses,
            }
        });
        Ok(Self {
            pid: std::process::id(),
            seconds,
            chiplets: chiplets.collect(),
            operations: operations(gru),
            counters: (gru.stats().counters())
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
        })
    }

    /// Asks a run that is at work.
    ///
    /// # Errors
    /// There is none, or more than one and `pid` does not say which; it does not answer.
    pub(crate) fn ask(options: &StatusOptions) -> Result<Self, StatusError> {
        let mut live = live();
        let list = |live: &[(u32, UnixStream)]| {
            let pids: Vec<_> = live.iter().map(|(pid, _)| pid.to_string()).collect();
            pids.join(", ")
        };
        if live.is_empty() {
            return Err(StatusError::NoRun {
                folder: folder().display().to_string(),
            });
        }
        let nth = match options.pid {
            Some(pid) => live
                .iter()
                .position(|(own, _)| *own == pid)
                .ok_or_else(|| {
                    let live = list(&live);
                    StatusError::NoSuchRun { pid, live }
                })?,
            None if live.len() > 1 => return Err(StatusError::Several { live: list(&live) }),
            None => 0,
        };
        let (pid, mut stream) = live.swap_remove(nth);
        let mut text = String::new();
        (stream.set_read_timeout(Some(PATIENCE)))
            .and_then(|()| stream.read_to_string(&mut text))
            .map_err(|error| StatusError::NoAnswer { pid, error })?;
        serde_json::from_str(&text).map_err(|error| StatusError::NotUnderstood { pid, error })
    }
}

/// The runs that are at work, and connections to them.
fn live() -> Vec<(u32, UnixStream)> {
    let Ok(entries) = std::fs::read_dir(folder()) else {
        return Vec::new();
    };
    let mut live = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| {
            let pid = name.strip_prefix("shootdown-")?.strip_suffix(".sock")?;
            pid.parse().ok()
        });
        let Some(pid) = pid else { continue };
        match UnixStream::connect(entry.path()) {
            Ok(stream) => live.push((pid, stream)),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                // It is gone. If this is not allowed to remove what it left, somebody else will.
                let _ = std::fs::remove_file(entry.path());
            }
            Err(_) => {}
        }
    }
    live.sort_by_key(|(pid, _)| *pid);
    live
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "run {}, at work for {:.1} s\n", self.pid, self.seconds)?;
        writeln!(
            f,
            "blade chiplet  condition  contexts segments  ASIDs   gen     next  wraps        TLB  purges  faults  instructions    misses"
        )?;
        for one in &self.chiplets {
            let tlb = format!("{}/{}", one.tlb_entries, one.tlb_capacity);
            writeln!(
                f,
                "{:>5} {:<8} {:<10} {:>5}/16 {:>8} {:>6} {:>5} {:>#8x} {:>6} {:>10} {:>7} {:>7} {:>13} {:>9}",
                one.blade,
                one.name,
                one.condition,
                one.contexts.len(),
                one.segments,
                one.asids,
                one.generation,
                one.next_asid,
                one.wraps,
                tlb,
                one.purges_open,
                one.pending_faults,
                one.instructions,
                one.misses
            )?;
        }
        writeln!(
            f,
            "\nchiplet  context      space     ASID  blocks  data  resolved by      loaded ms  pending    user  interrupt  polled  drop-ins  stolen  steals"
        )?;
        for chiplet in &self.chiplets {
            for one in &chiplet.contexts {
                let space = match one.space {
                    Some(space) => format!("{space:#x}"),
                    None => "kernel".to_owned(),
                };
                writeln!(
                    f,
                    "{:<8} {:>7} {:>10} {:>#8x} {:>7} {:>5}  {:<15} {:>10} {:>8} {:>7} {:>10} {:>7} {:>9} {:>7} {:>7}{}",
                    chiplet.name,
                    one.index,
                    space,
                    one.asid,
                    one.control_blocks,
                    one.data_bytes,
                    one.misses,
                    one.loaded_ms,
                    one.pending_faults,
                    one.misses_user,
                    one.misses_interrupt,
                    one.misses_polled,
                    one.drop_ins,
                    one.stolen,
                    one.steals,
                    if one.leaked { "  leaked" } else { "" }
                )?;
            }
        }
        writeln!(f)?;
        write_operations(f, &self.operations)?;
        writeln!(f)?;
        for (name, count) in self.counters.iter().filter(|(_, count)| *count > 0) {
            writeln!(f, "{name:<24} {count:>12}")?;
        }
        Ok(())
    }
}

/// A table of what operations have cost.
pub(crate) fn write_operations(
    f: &mut fmt::Formatter<'_>,
    operations: &[Operation],
) -> fmt::Result {
    writeln!(
        f,
        "operation of a handle              count   average us       max us    failed"
    )?;
    for one in operations {
        writeln!(
            f,
            "{:<28} {:>11} {:>12.2} {:>12.1} {:>9}",
            one.name,
            one.count,
            one.average_ns as f64 / 1e3,
            one.max_ns as f64 / 1e3,
            one.failed
        )?;
    }
    Ok(())
}
