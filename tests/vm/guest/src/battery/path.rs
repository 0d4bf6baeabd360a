//! The way of a shootdown through windows to the kernel: what it must not do, and what it must not forget.

use std::cell::Cell;
use std::sync::Arc;

use shootdown::{
    AddressSpace, Deadlines, DmaWindow, Map, MapError, ProcessMemory, Range, Rights, WouldBlock,
};
use shootdown_vfio::{Device, DeviceWork, InFlight, Iommu, Reuse, Window};
use shootdown_vm::protocol::Line;

use super::rig::{Rig, SECOND, SIZE, options, page, unmapping};
use crate::alloc;
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::pci::{EDU, Function, NVME, RNG};
use crate::port::say;

pub(crate) const CHECKS: &[Check] = &[
    check(
        "window:from-stop-to-resume-nothing-is-allocated",
        no_allocation,
    ),
    check("window:of-two-containers-goes-from-both", two),
    check("window:an-ats-cache-is-flushed-with-it", ats),
];

thread_local! {
    /// What the allocator counted in the last shootdown.
    static COUNTED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Watches the allocator for as long as it is stopped; allocates itself, if it is to be seen.
struct Watching {
    allocates: bool,
}

impl DeviceWork for Watching {
    fn stop(&self, _: Range, _: bool) -> Result<InFlight, WouldBlock> {
        alloc::watch();
        Ok(InFlight::Work)
    }

    fn drained(&self, _: Range) -> bool {
        if self.allocates {
            drop(std::hint::black_box(Box::new(7_u64)));
        }
        true
    }

    fn resume(&self, _: Range) {
        COUNTED.set(alloc::watched());
    }
}

type Change<'c> = &'c dyn Fn() -> Result<(), MapError>;

fn no_allocation() -> Outcome {
    let rig = Rig::new()?;
    for (allocates, expected) in [(false, 0), (true, 2)] {
        let memory = rig.pages(64)?;
        let window = rig.window_of(memory, 4 * SIZE, Arc::new(Watching { allocates }))?;
        let changes: [(&str, Change<'_>); 3] = [
            ("discard", &|| rig.space.discard(page(memory, 3))),
            ("protect", &|| {
                rig.space.protect(page(memory, 9), Rights::READ)
            }),
            ("unmap", &|| rig.space.unmap(page(memory, 17))),
        ];
        for (name, change) in changes {
            COUNTED.set(None);
            change()?;
            demand_eq!(
                COUNTED.get(),
                Some(expected),
                format!("calls of the allocator in {name}")
            );
        }
        COUNTED.set(None);
        unmapping(&[window.iova_of(page(memory, 32))?], || {
            rig.space.unmap(page(memory, 32))
        })?;
        demand_eq!(
            COUNTED.get(),
            Some(expected),
            "calls of the allocator between the marks"
        );
    }
    Ok(())
}

fn two() -> Outcome {
    let [edu, nvme] = [EDU, NVME].map(|which| -> Result<_, Failure> {
        Ok(shootdown_vfio::open(&Function::find(which)?.address)?)
    });
    let (edu, nvme): (Device, Device) = (edu?, nvme?);
    let endpoint = |device: &Device| -> Arc<dyn DmaWindow> {
        device.container().expect("it was opened with one").clone()
    };
    let iommu = Iommu::new(vec![endpoint(&edu), endpoint(&nvme)], Reuse::Late)?;
    let space = AddressSpace::managed(
        Arc::new(ProcessMemory::reserve(16 << 20)?),
        Deadlines::default(),
    );
    let memory = space.map(Map::anonymous(8 * SIZE))?;
    let window = Window::open(&iommu, &space, memory, Arc::new(()), options(2 * SIZE))?;
    say(&Line::Domains(2));
    let first = Range::new(window.iova().start().get(), 2 * SIZE)?;
    unmapping(&[first], || space.discard(page(memory, 1)))?;
    window.touch(memory, SECOND)?;
    unmapping(&[window.iova()], || space.unmap(memory))?;
    Ok(())
}

fn ats() -> Outcome {
    let function = Function::find(RNG)?;
    let device = shootdown_vfio::open(&function.address)?;
    let container = device.container().expect("it was opened with one").clone();
    let iommu = Iommu::new(vec![container], Reuse::Late)?;
    let space = AddressSpace::managed(
        Arc::new(ProcessMemory::reserve(16 << 20)?),
        Deadlines::default(),
    );
    let memory = space.map(Map::anonymous(16 * SIZE))?;
    let window = Window::open(&iommu, &space, memory, Arc::new(()), options(4 * SIZE))?;
    say(&Line::Ats(function.requester()));
    let second = Range::new(window.iova().start().get() + 4 * SIZE, 4 * SIZE)?;
    unmapping(&[second], || space.discard(page(memory, 6)))?;
    window.touch(memory, SECOND)?;
    demand!(window.is_mapped(memory)?, "the window did not come back");
    unmapping(&[window.iova()], || space.unmap(memory))?;
    Ok(())
}
