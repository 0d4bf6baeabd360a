//! Child processes that do not outlive this one, and do not run for ever.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, at};

/// Set by Ctrl-C. Relaxed everywhere: it carries nothing else.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Between two looks at a child.
pub(crate) const TICK: Duration = Duration::from_millis(20);

/// Whether Ctrl-C was pressed.
pub(crate) fn check() -> Result<(), Error> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(Error::Interrupted);
    }
    Ok(())
}

/// A child that is killed when this is dropped, and by the kernel when the thread that started it ends in any other way.
#[derive(Debug)]
pub(crate) struct Killed(pub(crate) Child);

impl Killed {
    /// Starts it. `mend` says what to do if the program is not there.
    pub(crate) fn spawn(command: &mut Command, mend: &'static str) -> Result<Self, Error> {
        // SAFETY: between fork and exec only prctl and getppid are called; both are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                // The option that follows takes one argument, a signal number.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        // Ctrl-C is ours to handle: the child is not to see the terminal's signal.
        command.process_group(0);
        let started = command.spawn();
        started.map(Self).map_err(|source| Error::NotStarted {
            command: shown(command),
            source,
            mend,
        })
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end and gives what it wrote. What it says while it runs goes to `log`.
pub(crate) fn call(
    command: &mut Command,
    log: &Path,
    limit: Duration,
    mend: &'static str,
) -> Result<String, Error> {
    let file = at(log, File::create(log))?;
    let errors = at(log, file.try_clone())?;
    command
        .stdin(std::process::Stdio::null())
        .stdout(file)
        .stderr(errors);
    let mut child = Killed::spawn(command, mend)?;
    let begun = Instant::now();
    let status = loop {
        check()?;
        if let Some(status) = at(log, child.0.try_wait())? {
            break status;
        }
        if begun.elapsed() > limit {
            return Err(Error::TooLong {
                command: shown(command),
                seconds: limit.as_secs(),
            });
        }
        std::thread::sleep(TICK);
    };
    let output = String::from_utf8_lossy(&at(log, std::fs::read(log))?).into_owned();
    if status.success() {
        Ok(output)
    } else {
        Err(Error::Failed {
            command: shown(command),
            status,
            output: output.trim().to_owned(),
        })
    }
}

/// The command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
