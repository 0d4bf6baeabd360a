//! TLB misses: by the thread that serves a chiplet's fault map, by whoever polls the control block, or by the user's own thread after
//! CALL_OS. What all of them do, [`fill`] says.
//!
//! The thread takes all that is in the map. The misses of one segment are answered together, by one begin and one retry; where an
//! invalidation came between, or one is in progress, they are taken up one by one, so that none waits for an invalidation of what
//! another has missed.
//!
//! The first two only try the map lock: if it is not to be had, invalidations go on for too long, or a device of the registration is
//! in quarantine, the miss is left to its user (R33), who is told.

use shootdown::{FaultError, Interrupts};
use shootdown_primitive::sync::Arc;
use shootdown_primitive::sync::atomic::{AtomicBool, Ordering};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use crate::chiplet::Chiplet;
use crate::config::MissMode;
use crate::context::{Context, Inside};
use crate::error::GruError;
use crate::fill::{self, Batch, pending};
use crate::handle::Operation;
use crate::layout::{FAULT_MAP, MAP_WORDS, fault, fault_map, slots, tfh};

/// How long the service thread sleeps at most, which is how late it sees that it is told to stop.
const NAP: Duration = Duration::from_millis(20);

/// Interrupts in a row that may come for nothing: each round also answers faults whose interrupt is yet to be taken.
const FOR_NOTHING: u32 = 16;

/// Serves a chiplet's fault map until told to stop, or until the chiplet is gone.
pub(crate) fn serve(chiplet: &Chiplet, interrupts: &dyn Interrupts, stop: &AtomicBool) {
    let mut for_nothing = 0;
    let mut batch = Batch::of_a_chiplet();
    // Acquire, with the driver's release.
    while !stop.load(Ordering::Acquire) {
        let fired = interrupts.wait(FAULT_MAP, NAP);
        if let (Ok(fired), Ok(found)) = (fired, round(chiplet, &mut batch)) {
            chiplet.counters.interrupts.add(fired);
            for_nothing = if fired == 0 || found {
                0
            } else {
                for_nothing + 1
            };
            // A storm is looked at now and then: it must not take the processor from others.
            if for_nothing > FOR_NOTHING {
                thread::sleep(NAP);
            }
        } else {
            // Contexts that are loaded from now on do not rely on this thread.
            chiplet.served.store(false, Ordering::Release);
            tracing::error!(chiplet = %chiplet.name, "chiplet gone: its faults are not served");
            return;
        }
    }
}

/// The bits of the fault map from `first` on, a slot each.
fn map(chiplet: &Chiplet, first: usize) -> Result<u128, GruError> {
    let mut bits = 0;
    for word in 0..MAP_WORDS {
        let read = chiplet.registers.read(fault_map(first + word))?;
        bits |= u128::from(read) << (64 * word);
    }
    Ok(bits)
}

/// The bits that are set.
pub(crate) fn each(mut bits: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let slot = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(slot)
    })
}

/// Answers every fault in the map once, wakes whoever sleeps for a completion, and says whether there was anything. What comes
/// meanwhile has its own interrupt.
fn round(chiplet: &Chiplet, batch: &mut Batch) -> Result<bool, GruError> {
    let mut found = false;
    let done = map(chiplet, MAP_WORDS)?;
    for word in (0..MAP_WORDS).filter(|word| (done >> (64 * word)) as u64 != 0) {
        let bits = (done >> (64 * word)) as u64;
        chiplet.registers.write(fault_map(MAP_WORDS + word), bits)?;
    }
    for slot in each(done) {
        found = true;
        chiplet.counters.completions.hit();
        if let Some((context, _)) = chiplet.owner(slot) {
            context.complete();
        }
    }
    let mut left = map(chiplet, 0)?;
    while left != 0 {
        let Some((context, loaded)) = chiplet.owner(left.trailing_zeros() as usize) else {
            left &= left - 1;
            continue;
        };
        let polled = context.options.misses == MissMode::FaultMapPolled;
        let mut cbs = 0;
        for (cb, slot) in slots(loaded.cb_map).enumerate() {
            let is_set = left & (1 << slot) != 0;
            left &= !(1 << slot);
            if is_set
                && !polled
                && tfh::state(chiplet.registers.read(fault(slot))?) == tfh::MISS_MAP
            {
                cbs |= 1 << cb;
            }
        }
        found |= cbs != 0;
        serve_segment(&context, cbs, batch)?;
    }
    Ok(found)
}

/// Answers the misses of some control blocks of a context that are in the fault map.
///
/// # Errors
/// The chiplet is gone. What else goes wrong concerns one of them.
fn serve_segment(context: &Arc<Context>, cbs: u128, batch: &mut Batch) -> Result<(), GruError> {
    let survive = |error: GruError| match error {
        GruError::Device(error) => Err(GruError::Device(error)),
        error => {
            let chiplet = &context.chiplet.name;
            tracing::warn!(%chiplet, %error, "fault not resolved");
            Ok(())
        }
    };
    let mut left = cbs;
    if cbs.count_ones() > 1 {
        together(context, &mut left, batch).or_else(survive)?;
    }
    for cb in each(left) {
        service(context, cb, By::Interrupt, batch).or_else(survive)?;
    }
    Ok(())
}

/// Tries to answer misses by one begin and one retry, and takes those from `cbs` that it need not be tried with once more.
fn together(context: &Context, cbs: &mut u128, batch: &mut Batch) -> Result<(), GruError> {
    let space = (context.user.as_ref()).and_then(|user| user.binding.pin.upgrade());
    let Some(space) = space else { return Ok(()) };
    let Some(map) = space.try_lock_read()? else {
        return Ok(());
    };
    let (by, begun) = (By::Interrupt, Instant::now());
    // Not waited for: an invalidation may be of what one of them only has missed.
    let time = Duration::ZERO;
    match fill::resolve(context, cbs, &space, map, (by, begun, time), batch) {
        Err(GruError::Fault(
            FaultError::Deadline { .. } | FaultError::DeviceQuarantined { .. },
        )) => Ok(()),
        result => result,
    }
}

/// On whose behalf a miss is resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum By {
    /// The service thread's, which was interrupted.
    Interrupt,
    /// That of who polls.
    Poll,
    /// That of a user who calls.
    Call,
}

impl By {
    /// The state that the fault handle has to be in.
    pub(crate) fn state(self) -> u64 {
        match self {
            Self::Interrupt | Self::Poll => tfh::MISS_MAP,
            Self::Call => tfh::MISS_USER,
        }
    }

    pub(crate) fn count(self, context: &Context) {
        let counters = (&context.chiplet.counters, &context.counters);
        let (all, own) = match self {
            Self::Interrupt => (&counters.0.misses_interrupt, &counters.1.misses_interrupt),
            Self::Poll => (&counters.0.misses_polled, &counters.1.misses_polled),
            Self::Call => (&counters.0.misses_user, &counters.1.misses_user),
        };
        all.hit();
        own.hit();
    }
}

/// Resolves a miss in the fault map, or leaves it to its user.
fn service(context: &Arc<Context>, cb: usize, by: By, batch: &mut Batch) -> Result<(), GruError> {
    let space = (context.user.as_ref()).and_then(|user| user.binding.pin.upgrade());
    let Some(space) = space else {
        return end(context, cb, Operation::FaultException);
    };
    let (begun, time) = (Instant::now(), context.chiplet.config.fault_deadline);
    let mut left = 1 << cb;
    while let Some(map) = space.try_lock_read()? {
        match fill::resolve(context, &mut left, &space, map, (by, begun, time), batch) {
            Ok(()) if left == 0 => return Ok(()),
            Ok(()) => {}
            Err(GruError::Fault(
                FaultError::Deadline { .. } | FaultError::DeviceQuarantined { .. },
            )) => break,
            Err(error) => return Err(error),
        }
    }
    context.chiplet.counters.faults_to_user.hit();
    end(context, cb, Operation::UserPolling)
}

/// Resolves the miss of a control block at work, if it has one in the fault map, on the thread of whoever polls. The map lock is only
/// tried.
pub(crate) fn poll(context: &Arc<Context>, cb: usize) -> Result<(), GruError> {
    let pending = match context.enter() {
        Some(inside) => pending(context, &inside, cb, By::Poll)?,
        None => None,
    };
    if pending.is_none() {
        return Ok(());
    }
    match service(context, cb, By::Poll, &mut Batch::of_one(context)) {
        // A caller that may not take the map lock here, as it holds it, leaves the miss to its user's call.
        Err(GruError::Refused(_)) => {
            context.chiplet.counters.faults_to_user.hit();
            end(context, cb, Operation::UserPolling)
        }
        result => result,
    }
}

/// Resolves the miss of a control block that waits for its user, on the user's thread. Waits for the map lock and for
/// invalidations.
pub(crate) fn call_os(context: &Arc<Context>, cb: usize) -> Result<(), GruError> {
    let space = (context.user.as_ref()).and_then(|user| user.binding.pin.upgrade());
    let Some(space) = space else {
        let _mapped = context.mapped()?;
        return end(context, cb, Operation::FaultException);
    };
    let (begun, time) = (Instant::now(), context.chiplet.config.fault_deadline);
    let (mut left, mut batch) = (1 << cb, Batch::of_one(context));
    while left != 0 {
        let (map, how) = (space.lock_read()?, (By::Call, begun, time));
        fill::resolve(context, &mut left, &space, map, how, &mut batch)?;
    }
    Ok(())
}

/// Ends the fault in another way than by an entry, if its context is not being unloaded, which then does so itself.
fn end(context: &Context, cb: usize, operation: Operation) -> Result<(), GruError> {
    let Some(inside) = context.enter() else {
        return Ok(());
    };
    answer(context, &inside, cb, operation)
}

pub(crate) fn answer(
    context: &Context,
    inside: &Inside<'_>,
    cb: usize,
    operation: Operation,
) -> Result<(), GruError> {
    if operation == Operation::FaultException {
        context.chiplet.counters.fault_exceptions.hit();
    }
    match inside.loaded.slot(cb) {
        Some(slot) => context.operate(fault(slot), operation, 0),
        None => Ok(()),
    }
}
