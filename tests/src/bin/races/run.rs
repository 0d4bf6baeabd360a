//! One run of a check, with a limit: a check that hangs has caught nothing.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, at};

/// Between two looks at a run.
const TICK: Duration = Duration::from_millis(5);

pub(crate) struct Run {
    /// `None`: it was killed at its limit.
    pub(crate) status: Option<ExitStatus>,
    /// Standard output and standard error.
    pub(crate) output: String,
    pub(crate) seconds: f64,
}

impl Run {
    pub(crate) fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// How it ended, for a person.
    pub(crate) fn ended(&self) -> String {
        match self.status {
            None => format!("killed after {:.0} s", self.seconds),
            Some(status) => match status.signal() {
                Some(signal) => format!("signal {signal}"),
                None => format!("exit status {}", status.code().unwrap_or(-1)),
            },
        }
    }
}

/// Runs a command until it ends, or kills it at `limit`. What it writes is in `log` afterwards.
pub(crate) fn run(command: &mut Command, log: &Path, limit: Duration) -> Result<Run, Error> {
    let file = at(log, File::create(log))?;
    let errors = at(log, file.try_clone())?;
    command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .env("RUST_BACKTRACE", "0");
    let begun = Instant::now();
    let mut child = command.spawn().map_err(|source| Error::NotStarted {
        command: shown(command),
        source,
    })?;
    let status = loop {
        if let Some(status) = at(log, child.try_wait())? {
            break Some(status);
        }
        if begun.elapsed() > limit {
            // An error says that it has ended just now.
            let _ = child.kill();
            at(log, child.wait())?;
            break None;
        }
        std::thread::sleep(TICK);
    };
    let seconds = begun.elapsed().as_secs_f64();
    let output = String::from_utf8_lossy(&at(log, fs::read(log))?).into_owned();
    Ok(Run {
        status,
        output,
        seconds,
    })
}

/// The command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
