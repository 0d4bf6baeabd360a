//! TLB misses: by the thread that serves a chiplet's fault map, or by the user's own thread after CALL_OS.
//!
//! Both do the same: map lock for read, begin over the *whole* entry (R34), translate, let the map lock go, retry under the
//! driver lock, write the entry under it and wait until it is in (R9; what else keeps a late entry out, and why the miss is
//! looked at before the sequence, says [`LateDropIns`](crate::LateDropIns)). What has been disturbed begins anew, from the map
//! lock on. The service thread only tries the map lock: if it is not to be had, invalidations go on for too long, or a device of
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
use crate::config::Plant;
use crate::context::Context;
use crate::error::{Ended, GruError};
use crate::handle;
use crate::layout::{FAULT_MAP, fault, fault_map, page_code, status, tfh};

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

/// Answers every fault in the map once, and says whether there was one. A fault that comes meanwhile has its own interrupt.
fn round(chiplet: &Chiplet) -> Result<bool, GruError> {
    let mut found = false;
    for word in 0..2 {
        let mut bits = chiplet.registers.read(fault_map(word))?;
        while bits != 0 {
            let slot = word * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            let Some(context) = chiplet.owner(slot) else {
                continue;
            };
            if tfh::state(chiplet.registers.read(fault(slot))?) != tfh::MISS_MAP {
                continue;
            }
            found = true;
            match service(&context, slot) {
                Ok(()) => {}
                Err(GruError::Device(error)) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(chiplet = %chiplet.name, slot, %error, "fault not resolved");
                }
            }
        }
    }
    Ok(found)
}

fn service(context: &Arc<Context>, slot: usize) -> Result<(), GruError> {
    let Some(space) = context.binding.pin.upgrade() else {
        return end(context, slot, tfh::EXCEPTION);
    };
    let begun = Instant::now();
    while let Some(map) = space.try_lock_read()? {
        match resolve(context, slot, &space, map, tfh::MISS_MAP, begun) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(GruError::Fault(
                FaultError::Deadline { .. } | FaultError::DeviceQuarantined { .. },
            )) => break,
            Err(error) => return Err(error),
        }
    }
    context.chiplet.counters.faults_to_user.hit();
    end(context, slot, tfh::USER_POLLING)
}

/// Resolves the miss of a control block that waits for its user, on the user's thread. Waits for the map lock and for
/// invalidations.
pub(crate) fn call_os(context: &Arc<Context>, slot: usize) -> Result<(), GruError> {
    let Some(space) = context.binding.pin.upgrade() else {
        let _mapped = context.mapped()?;
        return end(context, slot, tfh::EXCEPTION);
    };
    let begun = Instant::now();
    while !resolve(
        context,
        slot,
        &space,
        space.lock_read()?,
        tfh::MISS_USER,
        begun,
    )? {}
    Ok(())
}

/// Ends the fault in another way than by an entry, if its context is not being unloaded, which then does so itself.
fn end(context: &Context, slot: usize, opcode: u64) -> Result<(), GruError> {
    let Some(_inside) = context.enter() else {
        return Ok(());
    };
    answer(context, slot, opcode)
}

fn answer(context: &Context, slot: usize, opcode: u64) -> Result<(), GruError> {
    let chiplet = &context.chiplet;
    if opcode == tfh::EXCEPTION {
        chiplet.counters.fault_exceptions.hit();
    }
    let deadline = chiplet.config.handle_deadline;
    let what = "the answer to a TLB fault";
    handle::run(&*chiplet.registers, fault(slot), opcode, 0, what, deadline)
}

/// The miss of `slot`, if it is in `state`: its address, and whether it is a store through an entry that forbids it.
fn pending(context: &Context, slot: usize, state: u64) -> Result<Option<(Addr, bool)>, GruError> {
    let registers = &*context.chiplet.registers;
    let dw0 = registers.read(fault(slot))?;
    if tfh::state(dw0) != state {
        return Ok(None);
    }
    let address = Addr::new(registers.read(fault(slot) + tfh::MISS_ADDRESS)?);
    Ok(Some((address, status::cause(dw0) == tfh::MODIFY)))
}

/// One try to answer a miss: whether it is over. If not, an invalidation came between.
fn resolve(
    context: &Context,
    slot: usize,
    space: &AddressSpace,
    map: MapReadGuard<'_>,
    state: u64,
    begun: Instant,
) -> Result<bool, GruError> {
    let Some(_inside) = context.enter() else {
        return Ok(true);
    };
    context.check_epoch()?;
    let Some((address, modify)) = pending(context, slot, state)? else {
        return Ok(true);
    };
    let miss = Miss {
        slot,
        address,
        modify,
        state,
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
        Ok(Fill::NotAllowed) => answer(context, slot, tfh::EXCEPTION)?,
        Err(GruError::Fault(
            error @ (FaultError::Deadline { .. } | FaultError::DeviceQuarantined { .. }),
        )) => return Err(error.into()),
        Err(GruError::Fault(error)) => {
            tracing::warn!(%error, "fault ends with an exception");
            answer(context, slot, tfh::EXCEPTION)?;
        }
        Err(error) => return Err(error),
    }
    context.chiplet.fault_latency.record(begun.elapsed());
    Ok(true)
}

struct Miss {
    slot: usize,
    address: Addr,
    /// A store through an entry that forbids it.
    modify: bool,
    /// The state that the handle must be in.
    state: u64,
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
fn begin(context: &Context, entry: Range, time: Duration) -> Result<Fault<'_>, GruError> {
    let begun = Instant::now();
    loop {
        let left = time.saturating_sub(begun.elapsed());
        match context.share.begin(entry, left.min(SLICE)) {
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
    miss: &Miss,
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
            Some(begin(context, entry, left)?)
        };
        found = space.translate(miss.address);
        // A large page may have been split, or mapped, meanwhile: the sequence has to cover what is installed.
        if whole(found) == entry {
            break sequence;
        }
    };
    drop(map);
    let checked = !chiplet.planted(Plant::RETRY_NOT_CHECKED);
    let guard = checked.then(|| context.binding.lock.lock());
    if pending(context, miss.slot, miss.state)? != Some((miss.address, miss.modify)) {
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
    install(context, miss.slot, &found)?;
    chiplet.counters.faults_resolved.hit();
    Ok(Fill::Installed)
}

fn install(context: &Context, slot: usize, found: &Translation) -> Result<(), GruError> {
    let registers = &*context.chiplet.registers;
    let writable = found.rights.contains(Rights::WRITE);
    let attributes = tfh::fill(context.asid, page_code(found.page_size), writable);
    let base = fault(slot);
    registers.write(base + tfh::FILL_ADDRESS, found.page.start().get())?;
    registers.write(base + tfh::FILL, attributes)?;
    registers.write(base + tfh::FRAME, found.frame.0)?;
    answer(context, slot, tfh::WRITE_RESTART)
}
