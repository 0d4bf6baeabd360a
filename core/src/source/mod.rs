//! Event sources: what tells an address space of changes that somebody else makes.
//!
//! The space's own operations are always seen; that is the *managed* source. Programs also unmap through `free`, libraries and raw system
//! calls. A [`Source`] is told of those and makes external invalidations of them. None sees everything, so each *declares*, operation
//! by operation, what it is told: before the pages change, so that they wait (a barrier), when it is over. [`AddressSpace::watch`]
//! starts one, after a *self-test* that does each operation on a scratch page and looks what is told and when: what counts is what was
//! both declared and seen. A driver says what it [needs](crate::Notifier::needs); a registration on a space that is watched less
//! well is refused, with the name of the source that would do.
//!
//! | source | how it is told | munmap, mremap, MAP_FIXED | discards | mprotect, shmdt, truncate |
//! |---|---|---|---|---|
//! | managed | it makes the call | its own | its own | its own |
//! | [`Uffd`] | a userfaultfd, which says so when they are gone | late, end | told, beside it | not |
//! | [`Unotify`] | seccomp hands the call to a thread of ours, which performs it | before, barrier, end | the same | the same |
//!
//! What each tells of nine kinds of memory, what the kernel refuses, and what no source sees is in `tests/source_kinds.md` beside the
//! code, a table that a test makes and compares.
//!
//! # Children
//! Memory of this crate ([`ProcessMemory`](crate::ProcessMemory)) is kept out of children that are forked. Other memory is not, and a
//! registration does not change that: after a fork whoever writes first gets another frame, and a device that has not pinned the old one, or
//! walks page tables, goes on with what is the child's by then. No source holds a fork up; uffd tells of it late, to the privileged.
//! `MADV_DONTFORK` on what is registered is the remedy, and its owner's choice, as it takes the memory from the child. Between
//! vfork and exec a child has this memory and no other; what it unmaps is unmapped here, and seen. At `exec` everything goes, devices and
//! supervisors too: for whoever drives one it is the end of the process.
//!
//! # Threads
//! Whoever makes a foreign call may hold the allocator's lock, as `free` itself unmaps (R18). So a source has threads that neither allocate
//! nor free while somebody waits for them; what callbacks put off, releases above all, runs on one [`service`] thread of the
//! process, which may itself make calls that a source has to serve.

mod arena;
mod coverage;
pub(crate) mod gate;
mod io_uring;
mod observer;
mod operation;
mod probe;
mod relay;
mod scratch;
mod service;
pub(crate) mod uffd;
pub(crate) mod unotify;

use std::io;
use std::sync::Arc;

use thiserror::Error;

pub use self::coverage::Shortfall;
pub(crate) use self::coverage::{Change, Sources};
use self::coverage::{SOURCES, Table};
pub use self::gate::own_call;
pub use self::observer::{Observed, Observer};
pub use self::operation::{Needs, Operation, Operations, Sees};
pub use self::probe::{Seen, Tried};
use self::service::{Service, Stop};
pub use self::uffd::Uffd;
pub use self::unotify::Unotify;
use crate::addr::{PageSize, Range};
use crate::context::{self, Refused};
use crate::engine::{Invalidation, SinkError, What};
use crate::notifier::{Cause, Outcome};
use crate::plan::Pieces;
use crate::space::{AddressSpace, SpacePin};

type Declares = fn(Operation) -> Sees;

/// What the sources of this crate declare, by name; what a shortfall recommends is looked up here.
const BUILT_IN: &[(&str, Declares)] = &[
    (Uffd::NAME, uffd::declares),
    (Unotify::NAME, unotify::declares),
];

/// How a source is tested when it starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SelfTest {
    /// Whatever can be tried in a process that goes on to work: all but what forks.
    Quick,
    /// Everything: for a process that was made to find out.
    Thorough,
}

/// Why a space is not watched. Nothing has changed, except that a filter of system calls stays once it is installed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// This machine, or this process, lacks what the source needs.
    #[error("the source {source_name} is not available: {reason}")]
    NotAvailable {
        /// Which.
        source_name: &'static str,
        /// What is lacking.
        reason: String,
    },
    /// The filter of this process watches other addresses, and is permanent.
    #[error(
        "the source {source_name} watches {watched} in this process for good: {range} lies outside; start it first over all that is to be watched"
    )]
    Elsewhere {
        /// Which.
        source_name: &'static str,
        /// What was to be watched.
        range: Range,
        /// What is watched.
        watched: Range,
    },
    /// The range is not whole pages.
    #[error("{range} is not whole pages of 4 KiB")]
    Misaligned {
        /// What was to be watched.
        range: Range,
    },
    /// More sources than a space has room for, or more watched ranges than a source has.
    #[error("no room: {limit} are watched already")]
    NoRoom {
        /// The limit.
        limit: usize,
    },
    /// A system call failed in a way that has no name here.
    #[error("{call} failed: {error}")]
    System {
        /// Which.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
}

impl SourceError {
    fn last(call: &'static str) -> Self {
        let error = io::Error::last_os_error();
        Self::System { call, error }
    }

    fn not_available(source_name: &'static str, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self::NotAvailable {
            source_name,
            reason,
        }
    }
}

/// Something that is told of changes that others make to memory of this process.
///
/// # What an implementer must guarantee
/// * From the return of `start` to the call of `stop` it makes an external invalidation ([`Sink::begin`], [`Sink::late`]) of each
///   change that it [declares](Source::declares), in the order that it declares.
/// * Whatever it cannot keep up with becomes [`Sink::lost`]: everything is flushed, and nothing is passed over in silence (R19).
/// * On a thread that somebody waits for it neither allocates nor frees.
/// * When `stop` has returned it uses the sink no more, and no thread of the program hangs because of that.
pub trait Source: Send + Sync + 'static {
    /// By which errors and tables name it.
    fn name(&self) -> &'static str;

    /// What it is told of an operation.
    fn declares(&self, operation: Operation) -> Sees;

    /// Begins to tell `sinks`. The one for the self-test is among them. May allocate and wait.
    ///
    /// # Errors
    /// Nothing is told then.
    fn start(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError>;

    /// Ends telling one of them, once what was begun for it is over. Called where waiting is legal, or by the last owner of the
    /// sink.
    fn stop(&self, sink: &Arc<Sink>);

    /// Waits until what had happened when it was called has been told. For sources that are late.
    fn settle(&self) {}

    /// The framework has put new mappings over `range`, or somebody registers there: those who lose sight of what is mapped anew look
    /// again. Called inside the shootdown path, too.
    fn renew(&self, range: Range) {
        let _ = range;
    }
}

/// Where a source tells of changes in the range that it watches for one space.
#[derive(Debug)]
pub struct Sink {
    pin: SpacePin,
    range: Range,
    service: Service,
}

impl Sink {
    /// What is watched.
    pub fn range(&self) -> Range {
        self.range
    }

    /// `range`, as far as it is watched, is about to change: on return no device reaches it, until the value is
    /// [ended](ExternalChange::end). `None` if nothing of it is watched. Works during the exit of the space too: as long as
    /// anybody is registered, he is told. Neither allocates nor frees, nor does the end, nor who drops the error: what callbacks
    /// put off runs on a thread of this crate.
    ///
    /// # Errors
    /// The pages must not change then.
    pub fn begin(
        &self,
        range: Range,
        cause: Cause,
    ) -> Result<Option<ExternalChange<'_>>, SinkError> {
        let Some(range) = range.intersect(self.range) else {
            return Ok(None);
        };
        self.pin.space().registry.expect(range);
        context::callback_refusal_of_handlers("Sink::begin")?;
        let what = What {
            pieces: Pieces::UNKNOWN,
            cause,
            segments: &[],
        };
        // Also where it fails.
        let handover = Handover(self.service);
        let invalidation = Invalidation::begin_for_others(self.pin.space(), range, what)?;
        Ok(Some(ExternalChange {
            invalidation,
            _handover: handover,
        }))
    }

    /// `range` has changed, or is changing and nobody says when it is over.
    ///
    /// # Errors
    /// A device may still reach what is no longer there.
    pub fn late(&self, range: Range, cause: Cause) -> Result<(), SinkError> {
        match self.begin(range, cause)? {
            Some(change) => change.end(Outcome::Changed),
            None => Ok(()),
        }
    }

    /// The source has lost count: anything may have changed.
    ///
    /// # Errors
    /// As [`Sink::late`].
    pub fn lost(&self) -> Result<(), SinkError> {
        self.late(self.range, Cause::External)
    }

    /// The arena of the space's memory.
    fn arena(&self) -> Option<Range> {
        self.pin.space().table.arena
    }

    /// What the space's own operations are changing, into a list that has room for [`SLOTS`](crate::active::SLOTS).
    fn owned(&self, into: &mut Vec<Range>) {
        self.pin.space().sources.owned(into);
    }

    /// Whether exactly this range is being changed, by this thread (its number in the kernel), by an operation of the space itself,
    /// which has shot it down. Another thread's change of the same range is not its own: it may come when that operation has ended.
    pub fn is_own(&self, range: Range, thread: u32) -> bool {
        self.pin.space().sources.is_own(range, thread)
    }
}

/// A change that somebody else is making: between start and end of an invalidation. Several may be open on one thread, as one
/// system call can change several ranges. Dropping it counts as [`Outcome::Changed`].
pub struct ExternalChange<'s> {
    // In this order.
    invalidation: Invalidation<'s>,
    _handover: Handover,
}

/// When it is dropped the service thread gets what callbacks have put off, unless this thread is inside one still.
struct Handover(Service);

impl Drop for Handover {
    fn drop(&mut self) {
        if !context::inside_callback() {
            service::hand_over(self.0);
        }
    }
}

impl std::fmt::Debug for ExternalChange<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExternalChange").finish_non_exhaustive()
    }
}

impl ExternalChange<'_> {
    /// It is over.
    ///
    /// # Errors
    /// [`SinkError::HandlerPanicked`] if an `end` did; everybody else has been told.
    pub fn end(mut self, outcome: Outcome) -> Result<(), SinkError> {
        let ended = self.invalidation.end(outcome);
        ended.map_or(Ok(()), |ended| ended.panic_at_end())
    }
}

/// A source that watches a space. Dropping it stops it; where that could wait for itself, as in a callback, a thread of this crate
/// does, and dropping neither waits nor frees.
pub struct Watched {
    /// Until it is stopped.
    running: Option<Box<Stop>>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched")
            .field("source", &self.running().source.name())
            .field("range", &self.range())
            .finish_non_exhaustive()
    }
}

impl Watched {
    fn running(&self) -> &Stop {
        self.running.as_ref().expect("it is stopped by its end")
    }

    /// What is watched.
    pub fn range(&self) -> Range {
        self.running().sink.range
    }

    /// What the self-test came to, operation by operation.
    pub fn self_test(&self) -> &[Tried] {
        &self.running().tried
    }

    /// Stops it: what has been begun for the space is over on return, and later changes are not told. Registrations stay.
    ///
    /// # Errors
    /// [`Refused`] inside a callback, and with a `NotifierLock` held; the source goes on then, and is stopped by
    /// the value that was given back.
    pub fn stop(self) -> Result<(), (Self, Refused)> {
        if let Err(refused) = context::wait_refusal("stop") {
            return Err((self, refused));
        }
        drop(self);
        Ok(())
    }
}

fn key(sink: &Arc<Sink>) -> usize {
    Arc::as_ptr(sink) as usize
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        let sink = &running.sink;
        sink.pin.space().sources.remove(key(sink));
        if context::wait_refusal("stop").is_ok() {
            running.source.stop(sink);
        } else {
            // It could wait for itself: the service thread stops it.
            service::stop_later(running);
        }
    }
}

impl AddressSpace {
    /// Has `source` tell this space of what others do to `range`, which is usually the arena of its memory. It tests itself first: that
    /// takes some tenths of a second, and a few pages of its own. Registrations that exist are not looked at: register afterwards.
    ///
    /// # Errors
    /// [`SourceError`]; [`Refused`] where waiting is not legal.
    pub fn watch(&self, source: Arc<dyn Source>, range: Range) -> Result<Watched, SourceError> {
        self.watch_tested(source, range, SelfTest::Quick)
    }

    /// [`AddressSpace::watch`] with a self-test as thorough as `test` says.
    ///
    /// # Errors
    /// As there.
    pub fn watch_tested(
        &self,
        source: Arc<dyn Source>,
        range: Range,
        test: SelfTest,
    ) -> Result<Watched, SourceError> {
        context::map_lock_refusal("watch")?;
        if !range.is_aligned(PageSize::FourKiB) {
            return Err(SourceError::Misaligned { range });
        }
        let service = service::start()?;
        let sink = Arc::new(Sink {
            pin: self.pin(),
            range,
            service,
        });
        let tried = probe::start_and_test(&source, &sink, test, service)?;
        let table = Table::new(|operation| {
            let tried = tried.iter().find(|one| one.operation == operation);
            tried.map_or(Sees::empty(), |one| one.counts())
        });
        let sources = &self.space.sources;
        let entry = (key(&sink), source.clone());
        let watched = Watched {
            running: Some(Box::new(Stop {
                source,
                sink,
                tried,
                next: None,
            })),
        };
        if !sources.add(entry.0, range, table, entry.1) {
            return Err(SourceError::NoRoom { limit: SOURCES });
        }
        Ok(watched)
    }
}
