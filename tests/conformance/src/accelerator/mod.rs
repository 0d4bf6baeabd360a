//! The model device that the kit brings: contexts, a TLB that really caches, work in flight, completions that come as messages.
//!
//! It is a device that leaves nothing out for a driver to forget:
//! * *Contexts*, each of one address space. A context that is unloaded ends its work; it is unloaded when
//!   [`Accelerator::is_loaded`] says false.
//! * *Work* writes to one page after the other. For each it looks its translation up in the TLB, and **keeps what it has read until
//!   it is done with the page**: a flush takes the entry away and does not wait for the work. What waits is the driver:
//!   [`Accelerator::block`] keeps work from coming to any page of a range, [`Accelerator::is_idle`] says when none is at one.
//! * *Misses* stop the work. The driver installs an entry and restarts it, or aborts it.
//! * *Flush commands* are queued, and begun by a doorbell with a number of the driver's. When they are done the device sends a
//!   *completion*, which is that number: see [`Accelerator::completion`]. Numbers can get lost, come twice, come out
//!   of order, and be numbers that nobody has given ([`Fault`]).
//! * *Reset* ends everything; it is over when [`Accelerator::is_resetting`] says false.
//!
//! Like a real device it knows nothing of the framework, and checks nothing: what it is told it does. All methods return at once,
//! and may be called with any lock held, from any thread. They stand for register accesses, so the kit's allocator looks away
//! while they run.

mod engine;
mod state;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use shootdown::{Addr, FlushCommand, Range, Translation};

use self::state::{Entry, State};
use crate::alloc::outside;
use crate::author::{Failure, Fault, Hardware, Hook, Reach, Setup};

/// Commands that can be queued between two doorbells.
pub const QUEUE: usize = 8;
/// Pieces of work that can be under way.
pub const SLOTS: usize = 64;

/// A piece of work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct WorkId(pub(crate) u64);

/// What a piece of work is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WorkState {
    /// It goes on, or waits for a range to be unblocked.
    Running,
    /// It waits for an entry that allows it to write here.
    Miss(Addr),
    /// It is done. Told once.
    Done,
    /// It was aborted. Told once.
    Aborted,
    /// There is no such work: its context was unloaded, or the device was reset.
    Gone,
}

pub(crate) struct Core {
    setup: Setup,
    state: Mutex<State>,
    /// There is work to do, or something has ended.
    changed: Condvar,
    hook: Mutex<Option<Hook>>,
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here would be the model's; what is judged afterwards is judged by the oracle.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is due, then `f`.
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        outside(|| {
            let mut state = self.lock();
            state.settle();
            let result = f(&mut state);
            drop(state);
            self.changed.notify_all();
            result
        })
    }
}

/// The device. Dropping it ends its thread.
pub struct Accelerator {
    core: Arc<Core>,
    engine: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accelerator").finish_non_exhaustive()
    }
}

impl Accelerator {
    /// Loads a context that works on `space` ([`shootdown::AddressSpace::id`]). Contexts are numbered by the driver; whether
    /// the number was free.
    pub fn load(&self, context: u64, space: u64) -> bool {
        self.core.with(|state| state.load(context, space))
    }

    /// Begins to unload a context: its work ends, each piece at the latest when it is done with the page that it is at.
    pub fn unload(&self, context: u64) {
        self.core.with(|state| state.unload(context));
    }

    /// Whether a context is loaded, or still being unloaded.
    pub fn is_loaded(&self, context: u64) -> bool {
        self.core.with(|state| state.is_loaded(context))
    }

    /// Begins to write `value` to the first 8 bytes of each 4 KiB page of `range`, or of what `range` has of it. `None`: the context is not
    /// loaded, or there is no room ([`SLOTS`]).
    pub fn submit(&self, context: u64, range: Range, value: u64) -> Option<WorkId> {
        self.core.with(|state| state.submit(context, range, value))
    }

    /// What a piece of work is at.
    pub fn state(&self, work: WorkId) -> WorkState {
        self.core.with(|state| state.state_of(work))
    }

    /// Has work that waits for an entry look again.
    pub fn restart(&self, work: WorkId) {
        self.core.with(|state| state.restart(work));
    }

    /// Ends work that waits for an entry.
    pub fn abort(&self, work: WorkId) {
        self.core.with(|state| state.abort(work));
    }

    /// Installs an entry, in place of those that it overlaps.
    pub fn install(&self, context: u64, translation: &Translation) {
        let hook = self
            .core
            .hook
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        outside(|| {
            if let Some(hook) = hook {
                hook(translation.page);
            }
        });
        self.core.with(|state| {
            let Some(space) = state.space_of(context) else {
                return;
            };
            let stamp = self
                .core
                .setup
                .bus
                .oracle()
                .stamp(space, translation.page.start());
            state.install(Entry::new(context, translation, stamp));
        });
    }

    /// No work of the context comes to a page of `range` from here on, until the block with this number is taken away. Work that is
    /// at one goes on until it is done with it; work that misses on one says so.
    pub fn block(&self, context: u64, range: Range, number: u64) {
        self.core.with(|state| state.block(context, range, number));
    }

    /// Takes a block away. Nothing to do if there is none with this number.
    pub fn unblock(&self, context: u64, number: u64) {
        self.core.with(|state| state.unblock(context, number));
    }

    /// Whether no work of the context is at a page of `range`.
    pub fn is_idle(&self, context: u64, range: Range) -> bool {
        self.core.with(|state| state.is_idle(context, range))
    }

    /// Queues a flush command; its tag is a context. False: no room before the next doorbell ([`QUEUE`]).
    pub fn queue(&self, command: FlushCommand) -> bool {
        self.core.with(|state| state.queue(command))
    }

    /// Begins what is queued, which may be nothing. The completion will be `number`.
    pub fn ring(&self, number: u64) {
        self.core.with(|state| state.ring(number));
    }

    /// Takes the next completion. Everything of that doorbell is done then: the entries are gone.
    pub fn completion(&self) -> Option<u64> {
        self.core.with(State::completion)
    }

    /// Begins a reset: contexts, entries, work, blocks, commands and completions go.
    pub fn reset(&self) {
        self.core.with(State::reset);
    }

    /// Whether a reset is not over.
    pub fn is_resetting(&self) -> bool {
        self.core.with(|state| state.is_resetting())
    }
}

impl Hardware for Accelerator {
    const FAULTS: &'static [Fault] = &Fault::ALL;

    fn build(setup: &Setup) -> Result<Self, Failure> {
        let core = Arc::new(Core {
            setup: setup.clone(),
            state: Mutex::new(State::new(setup)),
            changed: Condvar::new(),
            hook: Mutex::new(None),
        });
        let own = Arc::clone(&core);
        let engine = std::thread::Builder::new()
            .name("accelerator".to_owned())
            .spawn(move || engine::run(&own))?;
        Ok(Self {
            core,
            engine: Some(engine),
        })
    }

    fn reach(&self, space: u64, part: Range) -> Option<Reach> {
        self.core.with(|state| state.reach(space, part))
    }

    fn operation(&self) {
        self.core.with(State::mark);
    }

    fn hold(&self, held: bool) -> bool {
        self.core.with(|state| state.held = held);
        true
    }

    fn on_install(&self, hook: Option<Hook>) -> bool {
        *self
            .core
            .hook
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = hook;
        true
    }
}

impl Drop for Accelerator {
    fn drop(&mut self) {
        self.core.with(|state| state.stopping = true);
        if let Some(engine) = self.engine.take() {
            // A panic of the engine has been printed by its thread.
            let _ = engine.join();
        }
    }
}
