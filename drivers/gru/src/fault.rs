//! TLB misses: by the thread that serves a chiplet's fault map, by whoever polls the control block, or by the user's own thread after
//! CALL_OS.
//!
//! All do the same: map lock for read, begin over the *whole* entry (R34), translate, let the map lock go, retry under the
//! driver lock, write the entry under it and wait until it is in (R9; what else keeps a late entry out, and why the miss is
//! looked at before the sequence, says [`LateDropIns`](crate::LateDropIns)). What has been disturbed begins anew, from the map
//! lock on. The first two only try the map lock: if it is not to be had, invalidations go on for too long, or a device of
//! the registration is in quarantine, the miss is left to its user (R33), who is told. Nothing mapped, or a store that is not
//! allowed, ends the instruction with an exception.
//!
//! Order of holding, the first longest: owner of the space → gate of the context → driver lock. The map lock is taken before
//! the gate is entered, as who ends a context may hold it and waits for the gate, and let go before the driver lock is taken,
//! so that no change of the map waits for a handle.

use shootdown::{
    Addr, AddressSpace, Fault, FaultError, Interrupts, MapReadGuard, PageSize, Range, Rights,
    Translation,
};
use shootdown_primitive::sync::Arc;
use shootdown_primitive::sync::atomic::{AtomicBool, Ordering, fence};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use crate::chiplet::Chiplet;
use crate::config::{MissMode, Plant};
use crate::context::{Context, Inside, User};
use crate::error::{Ended, GruError};
use crate::handle::Operation;
use crate::layout::{FAULT_MAP, MAP_WORDS, fault, fault_map, page_code, status, tfh};

/// How long the service thread sleeps at most, which is how late it sees that it is told to stop.
const NAP: Duration = Duration::from_millis(20);

/// Interrupts in a row that may come for nothing: each round also answers faults whose interrupt is yet to be taken.
const FOR_NOTHING: u32 = 16;

/// Serves a chiplet's fault map until told to stop, or until the chiplet is gone.
pub(crate) fn serve(chiplet: &Chiplet, interrupts: &dyn Interrupts, stop: &AtomicBool) {
    let mut for_nothing = 0;
    // Acquire, with the driver's release.
    while !stop.load(Ordering::Acquire) {
        let fired = interrupts.wait(FAULT_MAP, NAP);
        if let (Ok(fired), Ok(found)) = (fired, round(chiplet)) {
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

fn each(mut bits: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let slot = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(slot)
    })
}

/// Answers every fault in the map once, wakes whoever sleeps for a completion, and says whether there was anything. What comes
/// meanwhile has its own interrupt.
fn round(chiplet: &Chiplet) -> Result<bool, GruError> {
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
    for slot in each(map(chiplet, 0)?) {
        let Some((context, cb)) = chiplet.owner(slot) else {
            continue;
        };
        let polled = context.options.misses == MissMode::FaultMapPolled;
        if polled || tfh::state(chiplet.registers.read(fault(slot))?) != tfh::MISS_MAP {
            continue;
        }
        found = true;
        match service(&context, cb, By::Interrupt) {
            Ok(()) => {}
            Err(GruError::Device(error)) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(chiplet = %chiplet.name, slot, %error, "fault not resolved");
            }
        }
    }
    Ok(found)
}

/// On whose behalf a miss is resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum By {
    /// The service thread's, which was interrupted.
    Interrupt,
    /// That of who polls.
    Poll,
    /// That of a user who calls.
    Call,
}

impl By {
    /// The state that the fault handle has to be in.
    fn state(self) -> u64 {
        match self {
            Self::Interrupt | Self::Poll => tfh::MISS_MAP,
            Self::Call => tfh::MISS_USER,
        }
    }

    fn count(self, context: &Context) {
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
fn service(context: &Arc<Context>, cb: usize, by: By) -> Result<(), GruError> {
    let space = (context.user.as_ref()).and_then(|user| user.binding.pin.upgrade());
    let Some(space) = space else {
        return end(context, cb, Operation::FaultException);
    };
    let begun = Instant::now();
    while let Some(map) = space.try_lock_read()? {
        match resolve(context, cb, &space, map, by, begun) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
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
    match service(context, cb, By::Poll) {
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
    let begun = Instant::now();
    while !resolve(context, cb, &space, space.lock_read()?, By::Call, begun)? {}
    Ok(())
}

/// Ends the fault in another way than by an entry, if its context is not being unloaded, which then does so itself.
fn end(context: &Context, cb: usize, operation: Operation) -> Result<(), GruError> {
    let Some(inside) = context.enter() else {
        return Ok(());
    };
    answer(context, &inside, cb, operation)
}

fn answer(
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

/// The miss of `cb`, if it is in the state that `by` wants: its address, and whether it is a store through an entry that forbids it.
fn pending(
    context: &Context,
    inside: &Inside<'_>,
    cb: usize,
    by: By,
) -> Result<Option<(Addr, bool)>, GruError> {
    let registers = &*context.chiplet.registers;
    let Some(slot) = inside.loaded.slot(cb) else {
        return Ok(None);
    };
    let dw0 = registers.read(fault(slot))?;
    if tfh::state(dw0) != by.state() {
        return Ok(None);
    }
    let address = Addr::new(registers.read(fault(slot) + tfh::MISS_ADDRESS)?);
    Ok(Some((address, status::cause(dw0) == tfh::MODIFY)))
}

/// One try to answer a miss: whether it is over. If not, an invalidation came between.
fn resolve(
    context: &Context,
    cb: usize,
    space: &AddressSpace,
    map: MapReadGuard<'_>,
    by: By,
    begun: Instant,
) -> Result<bool, GruError> {
    let (Some(inside), Some(user)) = (context.enter(), &context.user) else {
        return Ok(true);
    };
    context.check_epoch(&inside.loaded)?;
    let Some((address, modify)) = pending(context, &inside, cb, by)? else {
        return Ok(true);
    };
    let miss = Miss {
        inside: &inside,
        user,
        cb,
        address,
        modify,
        by,
        begun,
    };
    match fill(context, &miss, space, map) {
        // One that is being unloaded has its fault forced by that.
        Err(GruError::SegmentEnded { .. }) => return Ok(true),
        Ok(Fill::Installed) => {}
        Ok(Fill::Gone) => return Ok(true),
        Ok(Fill::Disturbed) => {
            context.chiplet.counters.fault_retries.hit();
            return Ok(false);
        }
        Ok(Fill::NotAllowed) => answer(context, &inside, cb, Operation::FaultException)?,
        Err(GruError::Fault(
            error @ (FaultError::Deadline { .. } | FaultError::DeviceQuarantined { .. }),
        )) => return Err(error.into()),
        Err(GruError::Fault(error)) => {
            tracing::warn!(%error, "fault ends with an exception");
            answer(context, &inside, cb, Operation::FaultException)?;
        }
        Err(error) => return Err(error),
    }
    by.count(context);
    context.chiplet.fault_latency.record(begun.elapsed());
    Ok(true)
}

struct Miss<'a> {
    inside: &'a Inside<'a>,
    user: &'a User,
    cb: usize,
    address: Addr,
    /// A store through an entry that forbids it.
    modify: bool,
    by: By,
    /// When it was taken up.
    begun: Instant,
}

/// What came of a try to install an entry.
enum Fill {
    Installed,
    /// Nothing is mapped, or not with the rights that are needed.
    NotAllowed,
    /// Somebody else has answered.
    Gone,
    /// An invalidation came between.
    Disturbed,
}

/// How long a wait for an invalidation goes on before it is looked whether the context is being unloaded.
const SLICE: Duration = Duration::from_millis(1);

/// Begins to install `entry`. What it waits for may be the shootdown that unloads this very context, and waits for whoever is
/// inside its gate: so it gives up once that closes.
fn begin<'a>(
    context: &Context,
    user: &'a User,
    entry: Range,
    time: Duration,
) -> Result<Fault<'a>, GruError> {
    let begun = Instant::now();
    loop {
        let left = time.saturating_sub(begun.elapsed());
        match user.share.begin(entry, left.min(SLICE)) {
            Err(FaultError::Deadline { .. }) if context.is_closing() => {
                return Err(GruError::SegmentEnded {
                    why: Ended::Unmapped,
                });
            }
            Err(FaultError::Deadline { .. }) if left > SLICE => {}
            result => return Ok(result?),
        }
    }
}

/// Installs the entry for a miss, if it may.
fn fill(
    context: &Context,
    miss: &Miss<'_>,
    space: &AddressSpace,
    map: MapReadGuard<'_>,
) -> Result<Fill, GruError> {
    let chiplet = &context.chiplet;
    let small = Range::page(miss.address, PageSize::FourKiB);
    let narrow = chiplet.planted(Plant::WRONG_RANGE);
    let whole = |found: Option<Translation>| match found {
        Some(found) if !narrow => found.page,
        _ => small,
    };
    let mut found = space.translate(miss.address);
    let sequence = loop {
        let entry = whole(found);
        let waited = miss.begun.elapsed();
        let Some(left) = chiplet.config.fault_deadline.checked_sub(waited) else {
            return Err(FaultError::Deadline { entry, waited }.into());
        };
        let sequence = if chiplet.planted(Plant::NOT_BEGUN) {
            None
        } else {
            Some(begin(context, miss.user, entry, left)?)
        };
        found = space.translate(miss.address);
        // A large page may have been split, or mapped, meanwhile: the sequence has to cover what is installed.
        if whole(found) == entry {
            break sequence;
        }
    };
    drop(map);
    let checked = !chiplet.planted(Plant::RETRY_NOT_CHECKED);
    let guard = checked.then(|| miss.user.binding.lock.lock());
    if pending(context, miss.inside, miss.cb, miss.by)? != Some((miss.address, miss.modify)) {
        return Ok(Fill::Gone);
    }
    // With the fence in `quiesce`.
    fence(Ordering::SeqCst);
    // Where one of them is planted away nothing is checked.
    if let (Some(sequence), Some(guard)) = (&sequence, &guard)
        && sequence.retry(guard)
    {
        return Ok(Fill::Disturbed);
    }
    let needed = if miss.modify {
        Rights::READ_WRITE
    } else {
        Rights::READ
    };
    let Some(found) = found.filter(|found| found.rights.contains(needed)) else {
        return Ok(Fill::NotAllowed);
    };
    install(context, miss, &found)?;
    chiplet.counters.faults_resolved.hit();
    context.counters.drop_ins.hit();
    Ok(Fill::Installed)
}

fn install(context: &Context, miss: &Miss<'_>, found: &Translation) -> Result<(), GruError> {
    let loaded = &miss.inside.loaded;
    let Some(base) = loaded.slot(miss.cb).map(fault) else {
        return Ok(());
    };
    let registers = &*context.chiplet.registers;
    let writable = found.rights.contains(Rights::WRITE);
    let attributes = tfh::fill(loaded.asid, page_code(found.page_size), writable);
    registers.write(base + tfh::FILL_ADDRESS, found.page.start().get())?;
    registers.write(base + tfh::FILL, attributes)?;
    registers.write(base + tfh::FRAME, found.frame.0)?;
    context.operate(base, Operation::WriteRestart, 0)
}
