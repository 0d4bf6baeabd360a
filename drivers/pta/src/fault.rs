//! The fault path: page requests are taken from the ring, resolved, and answered.
//!
//! One thread serves them, all that are there at a time. The sequence of the invalidations is begun for the whole block that is to be
//! installed, what is mapped there is looked up, and the entries are written under the lock under which the sequence is checked once
//! more: so none is written that an invalidation has passed (R9, R34). What has been disturbed is taken up again after the
//! others, so that a space which is being torn up does not keep them waiting. It takes no map lock, and whoever ends a queue does not
//! wait for it (R33).

use shootdown_primitive::sync::atomic::{AtomicBool, Ordering};
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{
    Addr, AddressSpace, DeviceError, FaultError, Interrupts, PageSize, Range, Rights, Translation,
};

use crate::device::Core;
use crate::layout::{PASID, request, table};
use crate::mirror::Spares;
use crate::queue::Work;

/// How long the thread sleeps at most, which is how late it sees that it is told to stop.
const NAP: Duration = Duration::from_millis(20);
/// How long it waits for the invalidations of one page before it looks at the others.
const SLICE: Duration = Duration::from_millis(1);

struct Request {
    pasid: u64,
    group: u64,
    addr: Addr,
    needed: Rights,
    taken: Instant,
}

/// What came of a try.
enum Fill {
    Installed,
    /// Nothing is mapped, or not with the rights that are needed.
    NotAllowed,
    /// An invalidation came between.
    Disturbed,
}

/// Serves page requests until told to stop, or until the device is gone.
pub(crate) fn serve(core: &Core, interrupts: &dyn Interrupts, stop: &AtomicBool) {
    let mut open: Vec<Request> = Vec::new();
    // Acquire, with the driver's release.
    while !stop.load(Ordering::Acquire) {
        let nap = if open.is_empty() { NAP } else { SLICE };
        let served = interrupts
            .wait(request::VECTOR, nap)
            .and_then(|_| take(core, &mut open))
            .and_then(|()| answer_all(core, &mut open));
        if let Err(error) = served {
            tracing::error!(%error, "page requests are not served any more");
            return;
        }
    }
}

/// Takes what is in the ring.
fn take(core: &Core, open: &mut Vec<Request>) -> Result<(), DeviceError> {
    let registers = &core.registers;
    let size = registers.read(request::SIZE)?;
    let mut head = registers.read(request::HEAD)?;
    let tail = registers.read(request::TAIL)?;
    // A device that is gone, or lies, names no place in its ring.
    while head != tail && head < size && tail < size {
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
    Ok(())
}

/// Tries each once; what was disturbed is left.
fn answer_all(core: &Core, open: &mut Vec<Request>) -> Result<(), DeviceError> {
    let mut spares = Spares::default();
    for request in std::mem::take(open) {
        let filled = match resolve(core, &request, &mut spares)? {
            Fill::Disturbed if request.taken.elapsed() < core.config.fault_deadline => {
                core.counters.request_retries.hit();
                open.push(request);
                continue;
            }
            filled => filled,
        };
        let code = match filled {
            Fill::Installed => {
                core.counters.requests_resolved.hit();
                request::RETRY
            }
            Fill::NotAllowed | Fill::Disturbed => {
                core.counters.requests_refused.hit();
                request::INVALID
            }
        };
        let answer = PASID.of(request.pasid) | request::GROUP.of(request.group) | code;
        core.registers.write(request::RESPONSE, answer)?;
    }
    spares.give_back(core);
    Ok(())
}

/// Resolves a request by the registration of any queue that still has one.
fn resolve(core: &Core, request: &Request, spares: &mut Spares) -> Result<Fill, DeviceError> {
    for work in core.works_of(request.pasid) {
        let Some(space) = work.space.pin.upgrade() else {
            break;
        };
        match fill(core, (&work, &space), request, spares) {
            Ok(filled) => return Ok(filled),
            Err(Failed::Device(error)) => return Err(error),
            // It was given up just now: there may be others.
            Err(Failed::Fault(FaultError::Gone { .. })) => {}
            Err(Failed::Fault(FaultError::Deadline { .. })) => return Ok(Fill::Disturbed),
            Err(Failed::Fault(error)) => {
                tracing::warn!(%error, addr = %request.addr, "a page request ends with a fault");
                return Ok(Fill::NotAllowed);
            }
        }
    }
    Ok(Fill::NotAllowed)
}

enum Failed {
    Device(DeviceError),
    Fault(FaultError),
}

impl From<DeviceError> for Failed {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl From<FaultError> for Failed {
    fn from(error: FaultError) -> Self {
        Self::Fault(error)
    }
}

/// What is installed for a miss in the page that `found` says: a huge page alone, else the block of pages round it.
fn block(core: &Core, addr: Addr, found: Option<&Translation>) -> Range {
    let page = found.map_or(Range::page(addr, PageSize::FourKiB), |found| found.page);
    if page.len() >= u128::from(PageSize::TwoMiB.bytes()) {
        return page;
    }
    let bytes = core.config.fault_around.next_power_of_two() * PageSize::FourKiB.bytes();
    let start = addr.get() & !(bytes.clamp(1, PageSize::TwoMiB.bytes()) - 1);
    let around = Range::inclusive(start, start | (bytes - 1));
    around.map_or(page, |around| around.hull(page))
}

/// The pages of a block as the device has them: one of 2 MiB, or those of 4 KiB that are mapped.
fn pages(space: &AddressSpace, block: Range, found: &Translation) -> Vec<Translation> {
    if found.page_size == PageSize::TwoMiB {
        return vec![*found];
    }
    let small = PageSize::FourKiB;
    let addresses =
        (0..block.pages(small)).map(|nth| Addr::new(block.start().get() + (nth << small.shift())));
    let of = |addr: Addr| {
        let found = space.translate(addr)?;
        let into = (addr.get() - found.page.start().get()) >> small.shift();
        Some(Translation {
            page: Range::page(addr, small),
            page_size: small,
            frame: shootdown::Frame(found.frame.0 + into),
            rights: found.rights,
        })
    };
    addresses.filter_map(of).collect()
}

/// Installs what a request asks for, if it may.
fn fill(
    core: &Core,
    (work, space): (&Work, &AddressSpace),
    request: &Request,
    spares: &mut Spares,
) -> Result<Fill, Failed> {
    // Nothing is allocated with the lock held.
    spares.fill(core);
    loop {
        let before = space.translate(request.addr);
        let block = block(core, request.addr, before.as_ref());
        let sequence = work.share.begin(block, SLICE)?;
        let found = space.translate(request.addr);
        // A large page may have been split, or mapped, meanwhile: the sequence has to cover what is installed.
        if found.map(|found| found.page) != before.map(|before| before.page) {
            continue;
        }
        let Some(found) = found.filter(|found| found.rights.contains(request.needed)) else {
            return Ok(Fill::NotAllowed);
        };
        let pages = pages(space, block, &found);
        let mut mirror = work.space.mirror.lock();
        if sequence.retry(&mirror) {
            return Ok(Fill::Disturbed);
        }
        let mut complete = true;
        for page in &pages {
            complete &= mirror.install(page, spares)?.is_ok();
        }
        if complete {
            return Ok(Fill::Installed);
        }
        drop(mirror);
        if spares.fill(core) {
            continue;
        }
        let mut mirror = work.space.mirror.lock();
        if !mirror.suffices() {
            tracing::warn!(limit = core.table_limit, "no table of local memory is free");
            return Ok(Fill::NotAllowed);
        }
        // All that it has is dropped, and faults anew.
        core.counters.mirrors_recycled.hit();
        mirror.recycle()?;
    }
}
