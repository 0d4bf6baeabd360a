//! Work in a forked child, for what would leave its marks on PID 1, or is to be killed.

use std::io::{self, Read, Write};

use crate::check::{Failure, Outcome, demand};

/// A forked child that has not been waited for.
#[derive(Debug)]
pub(crate) struct Child(libc::pid_t);

impl Child {
    /// Forks; the child does `work` and ends.
    pub(crate) fn fork(work: impl FnOnce() -> u8) -> io::Result<Self> {
        // SAFETY: the guest's program has one thread when it forks, so the child finds no lock held by another.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let status =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
                // SAFETY: ends the child without running what belongs to the parent.
                unsafe { libc::_exit(status.into()) }
            }
            child => Ok(Self(child)),
        }
    }

    /// kill -9, and waits until it is gone with all that it had open.
    pub(crate) fn kill(self) -> io::Result<()> {
        // SAFETY: a child of ours that has not been waited for: the number is still its own.
        if unsafe { libc::kill(self.0, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.wait().map(drop)
    }

    /// Waits for its end; gives what it ended with.
    fn wait(&self) -> io::Result<i32> {
        let mut status = 0;
        // SAFETY: the status lives through the call.
        if unsafe { libc::waitpid(self.0, &raw mut status, 0) } != self.0 {
            return Err(io::Error::last_os_error());
        }
        Ok(status)
    }
}

/// Takes the right to lock any amount of memory from this process, which is to be a child.
pub(crate) fn become_unprivileged(lockable: u64) -> Outcome {
    let limit = libc::rlimit {
        rlim_cur: lockable,
        rlim_max: lockable,
    };
    // SAFETY: the structure lives through the call.
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    // SAFETY: takes numbers; another user has no CAP_IPC_LOCK.
    let dropped = unsafe { libc::setresuid(1, 1, 1) };
    demand!(
        (limited, dropped) == (0, 0),
        "setrlimit {limited}, setresuid {dropped}"
    );
    Ok(())
}

/// Does `work` in a child and gives what came of it.
pub(crate) fn run(work: impl FnOnce() -> Outcome) -> Outcome {
    let (mut reader, writer) = io::pipe()?;
    let child = Child::fork(|| {
        let text = match work() {
            Ok(()) => return 0,
            Err(Failure::NotSo(why)) => format!("N{why}"),
            Err(Failure::Error(why)) => format!("E{why}"),
        };
        let _ = (&writer).write_all(text.as_bytes());
        1
    })?;
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    let status = child.wait()?;
    match text.split_at_checked(1) {
        Some(("N", why)) => Err(Failure::NotSo(why.into())),
        Some((_, why)) => Err(Failure::Error(why.into())),
        None => {
            demand!(status == 0, "the child ended with {status:#x}");
            Ok(())
        }
    }
}
