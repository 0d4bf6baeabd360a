//! The fault path: page requests are taken from the ring, resolved, and answered.
//!
//! One thread serves them: in each round all that are there, up to a batch. Those that lie side by side are one *stretch*, which is
//! resolved at once, see [`stretch`]. What an invalidation has come between is taken up one by one; what is disturbed
//! then as well is taken up again after the others, so that a space which is being torn up does not keep them waiting. It takes no map
//! lock, and whoever ends a queue does not wait for it (R33).

use shootdown_primitive::sync::atomic::{AtomicBool, Ordering};
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{Addr, DeviceError, FaultError, Interrupts, PageSize, Range, Rights};

use crate::device::Core;
use crate::layout::{PASID, request, table};
use crate::stretch::{self, Failed, Fill, Request, Scratch};

/// How long the thread sleeps at most, which is how late it sees that it is told to stop.
const NAP: Duration = Duration::from_millis(20);
/// How long it waits for the invalidations of one page before it looks at the others.
const SLICE: Duration = Duration::from_millis(1);

/// Serves page requests until told to stop, or until the device is gone.
pub(crate) fn serve(core: &Core, interrupts: &dyn Interrupts, stop: &AtomicBool) {
    let mut open: Vec<Request> = Vec::new();
    let mut nap = NAP;
    // Acquire, with the driver's release.
    while !stop.load(Ordering::Acquire) {
        let served = interrupts
            .wait(request::VECTOR, nap)
            .and_then(|_| take(core, &mut open))
            .and_then(|more| answer_all(core, &mut open).map(|()| more));
        nap = match served {
            // Those have had their interrupt.
            Ok(true) => Duration::ZERO,
            Ok(false) if open.is_empty() => NAP,
            Ok(false) => SLICE,
            Err(error) => {
                tracing::error!(%error, "page requests are not served any more");
                return;
            }
        };
    }
}

/// Takes what is in the ring, a batch at most: whether there is more.
fn take(core: &Core, open: &mut Vec<Request>) -> Result<bool, DeviceError> {
    let registers = &core.registers;
    let size = registers.read(request::SIZE)?;
    let mut head = registers.read(request::HEAD)?;
    let tail = registers.read(request::TAIL)?;
    // A device that is gone, or lies, names no place in its ring.
    let is_there = |head: u64| head != tail && head < size && tail < size;
    for _ in 0..core.config.fault_batch.max(1) {
        if !is_there(head) {
            break;
        }
        let at = request::RING + head * 16;
        let (word, addr) = (registers.read(at)?, registers.read(at + 8)?);
        let asked = |field: crate::layout::Field, right| {
            if field.get(word) == 1 {
                right
            } else {
                Rights::empty()
            }
        };
        open.push(Request {
            pasid: PASID.get(word),
            group: request::GROUP.get(word),
            addr: Addr::new(addr),
            needed: asked(table::READ, Rights::READ) | asked(table::WRITE, Rights::WRITE),
            taken: Instant::now(),
            fill: Fill::Disturbed,
        });
        core.counters.requests.hit();
        head = (head + 1) % size;
        registers.write(request::HEAD, head)?;
    }
    // What was dropped comes again by itself.
    if registers.read(request::STATUS)? & 1 == 1 {
        registers.write(request::STATUS, 1)?;
        core.counters.ring_overflows.hit();
    }
    Ok(is_there(head))
}

/// Tries each once; what was disturbed is left.
fn answer_all(core: &Core, open: &mut Vec<Request>) -> Result<(), DeviceError> {
    if open.is_empty() {
        return Ok(());
    }
    let mut scratch = Scratch::default();
    open.sort_unstable_by_key(|one| (one.pasid, one.addr));
    let mut rest = &mut open[..];
    while !rest.is_empty() {
        let (count, reach) = stretch::first(&core.config, rest);
        let (stretch, after) = rest.split_at_mut(count);
        rest = after;
        // Not waited for: an invalidation beside a page that was asked for is none of its.
        if resolve(core, stretch, reach, Duration::ZERO, &mut scratch)? {
            continue;
        }
        core.counters.batches_cut.hit();
        for one in stretch.chunks_mut(1) {
            let page = Range::page(one[0].addr, PageSize::FourKiB);
            resolve(core, one, page, SLICE, &mut scratch)?;
        }
    }
    scratch.give_back(core);
    let mut written = Ok(());
    open.retain(|one| {
        let is_late = one.taken.elapsed() >= core.config.fault_deadline;
        let code = match one.fill {
            Fill::Disturbed if !is_late => {
                core.counters.request_retries.hit();
                return true;
            }
            Fill::Installed => {
                core.counters.requests_resolved.hit();
                request::RETRY
            }
            Fill::NotAllowed | Fill::Disturbed => {
                core.counters.requests_refused.hit();
                request::INVALID
            }
        };
        let answer = PASID.of(one.pasid) | request::GROUP.of(one.group) | code;
        if written.is_ok() {
            written = core.registers.write(request::RESPONSE, answer);
        }
        false
    });
    written
}

/// Resolves a stretch by the registration of any queue that still has one: whether each of its requests now has its answer. If not, an
/// invalidation has come between, and nothing was installed.
fn resolve(
    core: &Core,
    stretch: &mut [Request],
    reach: Range,
    patience: Duration,
    scratch: &mut Scratch,
) -> Result<bool, DeviceError> {
    let say = |stretch: &mut [Request], fill: Fill| {
        stretch.iter_mut().for_each(|one| one.fill = fill);
        Ok(fill != Fill::Disturbed)
    };
    for work in core.works_of(stretch[0].pasid) {
        let Some(space) = work.space.pin.upgrade() else {
            break;
        };
        let wanted = (&mut *stretch, reach);
        match stretch::fill(core, (&work, &space), wanted, patience, scratch) {
            Ok(true) => return Ok(true),
            Ok(false) | Err(Failed::Fault(FaultError::Deadline { .. })) => {
                return say(stretch, Fill::Disturbed);
            }
            Err(Failed::Device(error)) => return Err(error),
            // It was given up just now: there may be others.
            Err(Failed::Fault(FaultError::Gone { .. })) => {}
            Err(Failed::Fault(error)) => {
                tracing::warn!(%error, addr = %stretch[0].addr, "page requests end with a fault");
                return say(stretch, Fill::NotAllowed);
            }
        }
    }
    say(stretch, Fill::NotAllowed)
}
