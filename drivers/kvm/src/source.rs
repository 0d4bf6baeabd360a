//! kvm-mmu: the kernel's own notifier stream as a source of a space.
//!
//! It is told of everything that changes what is mapped, by whom and how ever: also of what no filter of system calls and no
//! userfaultfd sees, as an io_uring, a fork, another process's punch, and the kernel's own compaction. But nobody waits for it, and nobody
//! says when the change is over: handlers run *beside* it, sometimes before the pages change and sometimes after. So it is for drivers
//! that want to be told and tolerate faults, and never enough for one that needs a barrier. The space's own operations come
//! again, as changes of others.
//!
//! What does not fit the ring flushes everything (R19).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use shootdown::{Cause, Operation, Range, Sees, Sink, Source, SourceError};

use crate::error::KvmError;
use crate::stream::{News, Stream};

/// The kernel's MMU-notifier stream of this process, through an empty virtual machine and a tracepoint. One value watches for one
/// space. Needs root and /dev/kvm.
#[derive(Debug, Default)]
pub struct KvmMmu {
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    stream: Stream,
    /// Written to when the reader shall look.
    wake: OwnedFd,
    sinks: Mutex<Vec<Arc<Sink>>>,
    turns: Mutex<Turns>,
    turned: Condvar,
}

/// Looks of the reader.
#[derive(Debug, Default)]
struct Turns {
    begun: u64,
    done: u64,
    stopping: bool,
    reader: Option<ThreadId>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmMmu {
    const NAME: &'static str = "kvm-mmu";

    /// The source. Nothing is opened before it is started.
    pub fn new() -> Self {
        Self::default()
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        let running = lock(&self.running);
        running.as_ref().map(|running| running.shared.clone())
    }
}

impl Source for KvmMmu {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn declares(&self, _: Operation) -> Sees {
        Sees::TOLD
    }

    fn start(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        let mut running = lock(&self.running);
        if running.is_some() {
            return Err(SourceError::NoRoom { limit: 1 });
        }
        let ranges: Vec<Range> = sinks.iter().map(|sink| sink.range()).collect();
        let stream = Stream::open(&ranges).map_err(|error| match error {
            KvmError::System { call, error } => SourceError::System { call, error },
            other => SourceError::NotAvailable {
                source_name: Self::NAME,
                reason: other.to_string(),
            },
        })?;
        // SAFETY: numbers only.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            let (call, error) = ("eventfd", std::io::Error::last_os_error());
            return Err(SourceError::System { call, error });
        }
        let shared = Arc::new(Shared {
            stream,
            // SAFETY: opened just now.
            wake: unsafe { OwnedFd::from_raw_fd(wake) },
            sinks: Mutex::new(sinks.to_vec()),
            turns: Mutex::default(),
            turned: Condvar::new(),
        });
        let reader = shared.clone();
        let thread = std::thread::Builder::new().name("shootdown-kvm-mmu".to_owned());
        let thread = thread.spawn(move || reader.read());
        let thread = thread.map_err(|error| SourceError::System {
            call: "the start of a thread",
            error,
        })?;
        lock(&shared.turns).reader = Some(thread.thread().id());
        *running = Some(Running { shared, thread });
        Ok(())
    }

    fn stop(&self, sink: &Arc<Sink>) {
        let Some(shared) = self.shared() else { return };
        shared.settle();
        let last = {
            let mut sinks = lock(&shared.sinks);
            sinks.retain(|one| !Arc::ptr_eq(one, sink));
            sinks.is_empty()
        };
        // What was begun for it is over.
        shared.settle();
        if last && let Some(Running { shared, thread }) = lock(&self.running).take() {
            lock(&shared.turns).stopping = true;
            shared.wake();
            // A reader that panicked has nothing more to do.
            let _ = thread.join();
        }
    }

    fn settle(&self) {
        if let Some(shared) = self.shared() {
            shared.settle();
        }
    }
}

impl Shared {
    fn wake(&self) {
        let one = 1u64;
        // SAFETY: eight bytes, as the descriptor wants them.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// A record is there before its call returns: after a whole look that began later, all of them have been told.
    fn settle(&self) {
        let mut turns = lock(&self.turns);
        if turns.reader == Some(std::thread::current().id()) {
            return;
        }
        let awaited = turns.begun + 1;
        while turns.done < awaited && !turns.stopping {
            self.wake();
            turns = self
                .turned
                .wait_timeout(turns, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn read(&self) {
        loop {
            self.stream.wait(Duration::from_secs(1), Some(&self.wake));
            let mut count = 0u64;
            // SAFETY: eight bytes; the descriptor does not block.
            unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut count).cast(), 8) };
            {
                let mut turns = lock(&self.turns);
                if turns.stopping {
                    return;
                }
                turns.begun += 1;
            }
            let sinks = lock(&self.sinks).clone();
            self.stream.drain(|news| {
                for sink in &sinks {
                    // A device that may still reach what is gone is known to its space.
                    let _ = match news {
                        News::Unmapped(one) => sink.late(one.range, Cause::External),
                        News::Lost(_) => sink.lost(),
                    };
                }
            });
            let mut turns = lock(&self.turns);
            turns.done = turns.begun;
            drop(turns);
            self.turned.notify_all();
        }
    }
}
