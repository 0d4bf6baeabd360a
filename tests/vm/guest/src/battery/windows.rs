//! DMA windows over a managed address space, in front of the real kernel: what happens to a DMA in flight when the memory
//! changes under it.

use std::sync::Arc;
use std::time::Duration;

use shootdown::{
    AddressSpace, Cause, DeviceError, Map, MapError, Range, Rights, Unregistered, WouldBlock,
};
use shootdown_vfio::{DeviceWork, InFlight, Operation, Reuse, Window, WindowError};

use super::between::Between;
use super::rig::{BEFORE, DMA, Rig, SECOND, SIZE, page, race, unmapping};
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::edu::{CHUNK, Edu};
use crate::memory::PAGE;

pub(crate) const CHECKS: &[Check] = &[
    check("window:a-page-unmapped-with-dma-in-flight", unmap),
    check("window:a-page-discarded-with-dma-in-flight", discard),
    check("window:a-page-protected-with-dma-in-flight", protect),
    check("window:a-page-remapped-with-dma-in-flight", remap),
    check(
        "window:a-page-takes-its-granule-and-a-touch-brings-the-rest-back",
        granule,
    ),
    check(
        "window:closed-under-the-map-lock-with-dma-in-flight",
        closed,
    ),
    check(
        "window:unmapped-under-the-map-lock-with-dma-in-flight",
        locked,
    ),
    check(
        "window:work-that-drains-lands-before-the-pages-change",
        drained,
    ),
    check(
        "window:work-that-does-not-drain-costs-the-device-its-bus-mastering",
        stuck,
    ),
    check(
        "window:addresses-that-are-never-reused-make-late-dma-fault",
        sanitize,
    ),
    check("window:opening-is-all-or-nothing", all_or_nothing),
    check("window:64-mib-of-4-kib-granules-go-in-one-call", one_call),
];

/// In this one guest and witness must both fail.
pub(crate) const CONTROL: &[Check] = &[check("control:an-iommu-says-unmapped-and-is-not", liar)];

/// Changes the third page of a window of four with a DMA to it in flight. Gives window, memory, and where it was.
fn in_flight(
    rig: &Rig,
    cause: Cause,
    change: impl Fn(&AddressSpace, Range) -> Result<(), MapError>,
) -> Result<(Window, Range, Range), Failure> {
    race(|| {
        let memory = rig.pages(4)?;
        let window = rig.window(memory, SIZE)?;
        rig.load(DMA)?;
        let changed = page(memory, 2);
        let at = rig.arm(&window, changed)?;
        unmapping(&[at], || change(&rig.space, changed))?;
        if !rig.in_flight(at)? {
            return Ok(None);
        }
        rig.edu.finish()?;
        for other in [0, 1, 3] {
            let other = page(memory, other);
            demand!(window.is_mapped(other)?, "{other} went too");
            demand_eq!(
                rig.view(other).differs(0, PAGE, BEFORE),
                None,
                format!("memory beside it, {other}")
            );
        }
        demand!(
            !window.is_mapped(changed)?,
            "{changed} is said to be mapped"
        );
        let attribution = rig.iommu.attribute(at.start());
        let found = attribution.map(|it| (it.window, it.operation));
        demand_eq!(
            found,
            Some((window.id(), Operation::CutOff(cause))),
            "what the fault is attributed to"
        );
        rig.lands(&window, page(memory, 3))?;
        Ok(Some((window, memory, at)))
    })
}

/// Memory that is not there, or not with these rights, cannot be touched; the kernel says so.
fn refused(window: &Window, part: Range) -> Outcome {
    let touched = window.touch(part, SECOND);
    let unbacked = matches!(
        touched,
        Err(WindowError::Device(DeviceError::Unbacked { .. }))
    );
    demand!(unbacked, "a touch of {part}: {touched:?}");
    Ok(())
}

/// It can be used again, and is where it was.
fn comes_back(rig: &Rig, window: &Window, part: Range, at: Range) -> Outcome {
    rig.lands(window, part)?;
    demand_eq!(window.iova_of(part)?, at, "its IOVA");
    Ok(())
}

fn unmap() -> Outcome {
    let rig = Rig::new()?;
    let (window, memory, at) = in_flight(&rig, Cause::Unmap, |space, range| space.unmap(range))?;
    let gone = page(memory, 2);
    refused(&window, gone)?;
    rig.space.map(Map::anonymous(SIZE).at(gone.start()))?;
    comes_back(&rig, &window, gone, at)
}

fn discard() -> Outcome {
    let rig = Rig::new()?;
    let (window, memory, at) =
        in_flight(&rig, Cause::Discard, |space, range| space.discard(range))?;
    let fresh = page(memory, 2);
    demand_eq!(rig.view(fresh).differs(0, PAGE, 0), None, "the fresh page");
    comes_back(&rig, &window, fresh, at)
}

fn protect() -> Outcome {
    let rig = Rig::new()?;
    let change = |space: &AddressSpace, range| space.protect(range, Rights::READ);
    let (window, memory, at) = in_flight(&rig, Cause::Protect, change)?;
    let changed = page(memory, 2);
    demand_eq!(
        rig.view(changed).differs(0, PAGE, BEFORE),
        None,
        "the protected page"
    );
    refused(&window, changed)?;
    rig.space.protect(changed, Rights::READ_WRITE)?;
    comes_back(&rig, &window, changed, at)
}

fn remap() -> Outcome {
    let rig = Rig::new()?;
    // An address that is free, since it was just given back.
    let target = rig.pages(1)?;
    rig.space.unmap(target)?;
    let far = Range::new(target.start().get() + (256 << 20), SIZE)?;
    let change = |space: &AddressSpace, range| space.remap(range, far.start()).map(drop);
    let (window, memory, _) = in_flight(&rig, Cause::Remap, change)?;
    demand_eq!(
        rig.view(far).differs(0, PAGE, BEFORE),
        None,
        "the page at its new address"
    );
    refused(&window, page(memory, 2))
}

fn granule() -> Outcome {
    const PAGES: u64 = 16;
    let rig = Rig::new()?;
    race(|| {
        let memory = rig.pages(4 * PAGES)?;
        let window = rig.window(memory, PAGES * SIZE)?;
        rig.load(DMA)?;
        let (changed, beside) = (page(memory, 18), page(memory, 21));
        let at = rig.arm(&window, beside)?;
        let whole = Range::new(window.iova().start().get() + PAGES * SIZE, PAGES * SIZE)?;
        unmapping(&[whole], || rig.space.discard(changed))?;
        if !rig.in_flight(at)? {
            return Ok(None);
        }
        rig.edu.finish()?;
        demand_eq!(
            rig.view(beside).differs(0, PAGE, BEFORE),
            None,
            "memory beside, in the granule"
        );
        demand!(
            !window.is_mapped(beside)? && window.is_mapped(page(memory, 32))?,
            "not one granule went"
        );
        comes_back(&rig, &window, beside, at)?;
        demand!(window.is_mapped(changed)?, "the granule came back in parts");
        comes_back(&rig, &window, changed, window.iova_of(changed)?)?;
        Ok(Some(()))
    })
}

fn closed() -> Outcome {
    let rig = Rig::new()?;
    race(|| {
        let memory = rig.pages(4)?;
        let window = rig.window(memory, SIZE)?;
        rig.load(DMA)?;
        let at = rig.arm(&window, page(memory, 1))?;
        let guard = rig.space.lock_write()?;
        let closed = unmapping(&[window.iova()], || window.close())?;
        let won = rig.in_flight(at)?;
        demand_eq!(
            closed,
            Unregistered::Quiet,
            "closing with the map lock held"
        );
        guard.unmap(page(memory, 3))?;
        drop(guard);
        if !won {
            return Ok(None);
        }
        rig.edu.finish()?;
        for left in 0..3 {
            demand_eq!(
                rig.view(page(memory, left)).differs(0, PAGE, BEFORE),
                None,
                "memory"
            );
        }
        let touched = window.touch(page(memory, 0), SECOND);
        demand!(touched.is_err(), "a closed window was touched");
        Ok(Some(()))
    })
}

fn locked() -> Outcome {
    let rig = Rig::new()?;
    let change = |space: &AddressSpace, range| space.lock_write()?.unmap(range);
    in_flight(&rig, Cause::Unmap, change).map(drop)
}

/// edu can be asked, so its work can be drained.
struct Asked(Arc<Edu>);

impl DeviceWork for Asked {
    fn stop(&self, _: Range, _: bool) -> Result<InFlight, WouldBlock> {
        Ok(if self.0.busy() == Ok(false) {
            InFlight::Nothing
        } else {
            InFlight::Work
        })
    }

    fn drained(&self, _: Range) -> bool {
        self.0.busy() == Ok(false)
    }
}

fn drained() -> Outcome {
    let rig = Rig::new()?;
    race(|| {
        let memory = rig.pages(2)?;
        let window = rig.window_of(memory, SIZE, Arc::new(Asked(rig.edu.clone())))?;
        rig.load(DMA)?;
        let changed = page(memory, 1);
        let at = rig.arm(&window, changed)?;
        let early = rig.view(changed).differs(0, PAGE, BEFORE);
        unmapping(&[at], || rig.space.protect(changed, Rights::READ))?;
        if early.is_some() {
            return Ok(None);
        }
        demand!(!rig.edu.busy()?, "the page changed with work in flight");
        demand_eq!(
            rig.view(changed).differs(0, CHUNK, DMA),
            None,
            "what the work wrote"
        );
        Ok(Some(()))
    })
}

/// Work that is said never to end.
struct Stuck;

impl DeviceWork for Stuck {
    fn stop(&self, _: Range, _: bool) -> Result<InFlight, WouldBlock> {
        Ok(InFlight::Work)
    }

    fn drained(&self, _: Range) -> bool {
        false
    }
}

fn stuck() -> Outcome {
    let rig = Rig::new()?;
    let memory = rig.pages(2)?;
    let target = shootdown::Device::new(
        "edu",
        shootdown_vfio::FunctionReset::new(rig.device.clone()),
    );
    let mut options = super::rig::options(SIZE);
    options.deadline = Duration::from_millis(50);
    options.targets = vec![shootdown::Target {
        device: target,
        tag: 0,
    }];
    let window = Window::open(&rig.iommu, &rig.space, memory, Arc::new(Stuck), options)?;
    demand!(
        rig.device.is_bus_master()?,
        "the device is no bus master to begin with"
    );
    let changed = page(memory, 1);
    let at = window.iova_of(changed)?;
    unmapping(&[at], || rig.space.unmap(changed))?;
    demand!(
        !rig.device.is_bus_master()?,
        "the device is bus master still"
    );
    demand_eq!(rig.space.quarantined_bytes(), 0, "bytes in quarantine");
    // Without it nothing reaches the bus: no fault, and mapped memory stays as it is.
    let other = page(memory, 0);
    rig.arm(&window, other)?;
    rig.edu.finish()?;
    demand_eq!(
        rig.view(other).differs(0, PAGE, BEFORE),
        None,
        "mapped memory"
    );
    Ok(())
}

fn sanitize() -> Outcome {
    let rig = Rig::with(Reuse::Never, |container| container)?;
    race(|| {
        let (first, second) = (rig.pages(1)?, rig.pages(1)?);
        let window = rig.window(first, SIZE)?;
        rig.load(DMA)?;
        let at = rig.arm(&window, first)?;
        unmapping(&[at], || window.close())?;
        if !rig.in_flight(at)? {
            return Ok(None);
        }
        let next = rig.window(second, SIZE)?;
        demand!(!next.iova().overlaps(at), "{at} was handed out again");
        rig.edu.finish()?;
        for memory in [first, second] {
            demand_eq!(rig.view(memory).differs(0, PAGE, BEFORE), None, "memory");
        }
        Ok(Some(()))
    })
}

fn all_or_nothing() -> Outcome {
    let rig = Rig::new()?;
    let before = (
        rig.container.granules(),
        rig.container.query()?.dma_avail,
        rig.space.registrations(),
    );
    let memory = rig.pages(8)?;
    rig.space.unmap(page(memory, 5))?;
    // Not kept from children: that would find the hole before the kernel's own walk does.
    let mut options = super::rig::options(SIZE);
    options.keep_from_children = false;
    let opened = Window::open(&rig.iommu, &rig.space, memory, Arc::new(()), options);
    let unbacked = matches!(
        opened,
        Err(WindowError::Device(DeviceError::Unbacked { .. }))
    );
    demand!(unbacked, "a window over a hole: {opened:?}");
    let after = (
        rig.container.granules(),
        rig.container.query()?.dma_avail,
        rig.space.registrations(),
    );
    demand_eq!(after, before, "granules, dma_avail and registrations");
    Ok(())
}

fn one_call() -> Outcome {
    const PAGES: u64 = (64 << 20) / SIZE;
    let (rig, between) = Between::rig()?;
    let memory = rig.space.map(Map::anonymous(PAGES * SIZE))?;
    let window = rig.window(memory, SIZE)?;
    demand_eq!(
        between.calls(),
        (PAGES + 1, 0),
        "calls to open it, and the scratch page"
    );
    // A page that the device does not use costs one call too.
    unmapping(&[window.iova_of(page(memory, 7))?], || {
        rig.space.discard(page(memory, 7))
    })?;
    demand_eq!(between.calls(), (0, 1), "calls to discard a page");
    window.touch(memory, SECOND)?;
    demand_eq!(between.calls(), (1, 0), "calls to touch it all");
    unmapping(&[window.iova()], || rig.space.unmap(memory))?;
    demand_eq!(between.calls(), (0, 1), "calls to unmap it all");
    demand_eq!(rig.container.granules(), 1, "granules that are left");
    Ok(())
}

fn liar() -> Outcome {
    let (rig, between) = Between::rig()?;
    let memory = rig.pages(4)?;
    let window = rig.window(memory, SIZE)?;
    rig.load(DMA)?;
    let changed = page(memory, 2);
    let at = rig.arm(&window, changed)?;
    between.lie(true);
    let done = unmapping(&[at], || rig.space.protect(changed, Rights::READ));
    between.lie(false);
    done?;
    rig.edu.finish()?;
    demand_eq!(
        rig.view(changed).differs(0, PAGE, BEFORE),
        None,
        "the protected page"
    );
    Ok(())
}
