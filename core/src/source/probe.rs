//! The self-test: every operation is done on a scratch page, and a handler of ours looks what is told, and when.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::operation::{Needs, Operation, Operations, Sees};
use super::scratch::{self, Attempt, OLD, PAGE, Scratch};
use super::service::Service;
use super::{SelfTest, Sink, Source, SourceError};
use crate::addr::Range;
use crate::notifier::{Drain, Notifier, Op, Outcome, WouldBlock};
use crate::space::{AddressSpace, Deadlines};

/// How long the handler keeps the change waiting: if it does wait the old page is still there afterwards.
const NAP: Duration = Duration::from_millis(1);
/// How long is waited for what was declared.
const PATIENCE: Duration = Duration::from_millis(100);
/// And for what was not.
const IMPATIENCE: Duration = Duration::from_millis(2);

/// What moves pages from one node to another.
const BETWEEN_NODES: Operations = Operations::MBIND
    .union(Operations::MOVE_PAGES)
    .union(Operations::MIGRATE_PAGES);

/// What came of an operation that was tried.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Seen {
    /// This was told.
    Told(Sees),
    /// It could not be tried, for this reason: what was declared counts.
    NotTried(String),
}

/// One line of a self-test.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Tried {
    /// What was done.
    pub operation: Operation,
    /// What the source declares.
    pub declares: Sees,
    /// What was seen.
    pub seen: Seen,
}

impl Tried {
    /// What counts: what was both declared and seen. A source that loses now and then may have been lucky.
    pub fn counts(&self) -> Sees {
        match &self.seen {
            Seen::Told(seen) if seen.contains(Sees::TOLD) => self.declares & (*seen | Sees::LOSSY),
            Seen::Told(_) => Sees::empty(),
            Seen::NotTried(_) => self.declares,
        }
    }
}

/// Looks on from inside the shootdown.
#[derive(Default)]
struct Witness {
    armed: AtomicBool,
    page: AtomicUsize,
    visible: AtomicBool,
    returned: AtomicBool,
    seen: AtomicU8,
    ended: AtomicBool,
}

impl Witness {
    /// Whether the page is as it was: the kernel reads it, so that a page that is gone is an answer.
    fn is_old(&self) -> bool {
        let mut byte = 0u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: self.page.load(SeqCst) as *mut libc::c_void,
            iov_len: 1,
        };
        // SAFETY: one byte of this frame is written; what is read may be anything, mapped or not.
        let read =
            unsafe { libc::process_vm_readv(std::process::id() as i32, &local, 1, &remote, 1, 0) };
        read == 1 && byte == OLD
    }

    fn saw(&self, sees: Sees) {
        self.seen.fetch_or(sees.bits(), SeqCst);
    }

    /// Old, and the call has not returned.
    fn is_before(&self) -> bool {
        self.is_old() && !self.returned.load(SeqCst)
    }

    fn concerns(&self, range: Range) -> bool {
        self.armed.load(SeqCst) && range.holds((self.page.load(SeqCst) as u64).into())
    }
}

impl Notifier for Witness {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if self.concerns(op.range()) {
            self.saw(Sees::TOLD);
            if self.is_before() {
                self.saw(Sees::BEFORE);
                std::thread::sleep(NAP);
                if self.is_before() {
                    self.saw(Sees::BARRIER);
                }
            }
        }
        Ok(op.idle())
    }

    fn end(&self, op: &Op<'_>, outcome: Outcome) {
        if self.concerns(op.range()) {
            if outcome == Outcome::Changed {
                if self.visible.load(SeqCst) && self.is_old() {
                    // The page is yet to go, and the device may have it again by then: nobody has waited.
                    self.seen.fetch_and(!Sees::BARRIER.bits(), SeqCst);
                } else {
                    self.saw(Sees::END);
                }
            }
            self.ended.store(true, SeqCst);
        }
    }
}

impl Attempt for Witness {
    fn armed(&self, witness: usize, visible: bool) {
        self.page.store(witness, SeqCst);
        self.visible.store(visible, SeqCst);
        self.armed.store(true, SeqCst);
    }

    fn returned(&self) {
        self.returned.store(true, SeqCst);
    }
}

/// Starts `source` for `sink`, and tries it.
pub(super) fn start_and_test(
    source: &Arc<dyn Source>,
    sink: &Arc<Sink>,
    test: SelfTest,
    service: Service,
) -> Result<Vec<Tried>, SourceError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::get()?;
    let space = AddressSpace::without_memory(Deadlines::default());
    let probe = Arc::new(Sink {
        pin: space.pin(),
        range: scratch.watched(),
        service,
    });
    source.start(&[sink.clone(), probe.clone()])?;
    let alone = test == SelfTest::Thorough;
    let tried = Operation::ALL
        .iter()
        .map(|operation| attempt(&**source, &space, scratch, *operation, alone))
        .collect();
    scratch.clean();
    source.stop(&probe);
    Ok(tried)
}

fn attempt(
    source: &dyn Source,
    space: &AddressSpace,
    area: Scratch,
    operation: Operation,
    alone: bool,
) -> Tried {
    let declares = source.declares(operation);
    let witness = Arc::new(Witness::default());
    area.clean();
    source.renew(area.watched());
    source.settle();
    let registration = space.register(area.watched(), witness.clone(), &[]);
    let settled = Settled {
        source,
        witness: &witness,
    };
    let result = area.attempt(operation, &settled, alone);
    let patience = if declares.contains(Sees::TOLD) {
        PATIENCE
    } else {
        IMPATIENCE
    };
    let started = Instant::now();
    while !witness.ended.load(SeqCst) && started.elapsed() < patience && result.is_ok() {
        std::thread::sleep(Duration::from_micros(100));
    }
    witness.armed.store(false, SeqCst);
    drop(registration);
    let told = Sees::from_bits_truncate(witness.seen.load(SeqCst));
    // Where there is one node nothing moves, which only who stops the call itself can be told of.
    let nothing = !told.contains(Sees::TOLD)
        && !declares.contains(Sees::BARRIER)
        && BETWEEN_NODES.contains(operation.flag())
        && scratch::has_one_node();
    let seen = match result {
        Ok(()) if nothing => Seen::NotTried("this machine has one node".to_owned()),
        Ok(()) => Seen::Told(told),
        Err(reason) => Seen::NotTried(reason),
    };
    Tried {
        operation,
        declares,
        seen,
    }
}

/// The preparation mapped pages anew: a source that is late has told of that before the operation is made.
struct Settled<'t> {
    source: &'t dyn Source,
    witness: &'t Witness,
}

impl Attempt for Settled<'_> {
    fn armed(&self, page: usize, visible: bool) {
        let prepared = Range::new(page as u64 & !(PAGE as u64 - 1), PAGE as u64);
        if let Ok(prepared) = prepared {
            self.source.renew(prepared);
        }
        self.source.settle();
        self.witness.armed(page, visible);
    }

    fn returned(&self) {
        self.witness.returned();
    }
}
