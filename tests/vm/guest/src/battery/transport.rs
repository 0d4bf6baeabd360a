//! Containers of the transport crate in front of the real kernel: what the kernel refuses arrives as a typed error, and what it
//! does is accounted for.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{DeviceError, DmaWindow, Range, Rights};
use shootdown_vfio::{Container, Device};
use shootdown_vm::protocol::Line;

use super::child;
use super::rig::{SIZE, page, unmapping};
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function};
use crate::port::say;
use crate::raw;

pub(crate) const CHECKS: &[Check] = &[
    check("transport:errors-of-map-and-unmap-are-typed", typed),
    check(
        "transport:a-map-that-the-kernel-has-no-room-for-is-typed",
        no_room,
    ),
    check("transport:a-limit-on-locked-memory-is-typed", lock_limit),
    check("transport:an-unmap-behind-its-back-is-noticed", mismatch),
    check("transport:map-and-unmap-cost-what-the-ioctls-cost", cost),
];

const IOVA: u64 = 0x4000_0000;

pub(crate) fn open() -> Result<(Device, Arc<Container>), Failure> {
    let device = shootdown_vfio::open(&Function::find(EDU)?.address)?;
    let container = device.container().expect("it was opened with one").clone();
    Ok((device, container))
}

pub(crate) fn range(start: u64, len: u64) -> Range {
    Range::new(start, len).expect("a range of a check")
}

fn typed() -> Outcome {
    let (_device, container) = open()?;
    let memory = Memory::anonymous(8 * PAGE)?;
    let all = memory.range();
    let map = |start: u64, memory: Range| {
        container.map(
            range(start, memory.len() as u64),
            memory,
            Rights::READ_WRITE,
        )
    };
    demand_eq!(map(IOVA, page(all, 0)), Ok(()), "map");
    demand_eq!(
        map(IOVA + SIZE, range(page(all, 1).start().get(), 3 * SIZE)),
        Ok(()),
        "map of three pages"
    );
    let iova = range(IOVA, 2 * SIZE);
    demand_eq!(
        map(IOVA, range(all.start().get(), 2 * SIZE)),
        Err(DeviceError::Overlap { iova }),
        "overlap"
    );
    for start in [0xfee0_0000, IOVA + 0x10_0800] {
        let refused = map(start, page(all, 5));
        let misaligned = matches!(refused, Err(DeviceError::Misaligned { .. }));
        demand!(misaligned, "map at {start:#x}: {refused:?}");
    }
    let hole = Memory::anonymous(PAGE)?.range();
    let unbacked = map(IOVA + 0x10_0000, hole);
    demand!(
        matches!(unbacked, Err(DeviceError::Unbacked { .. })),
        "memory that is not there: {unbacked:?}"
    );
    memory.protect(libc::PROT_READ)?;
    let read_only = map(IOVA + 0x10_0000, page(all, 5));
    demand!(
        matches!(read_only, Err(DeviceError::Unbacked { .. })),
        "read-only memory: {read_only:?}"
    );
    let (cut, mapping) = (range(IOVA, 2 * SIZE), range(IOVA + SIZE, 3 * SIZE));
    demand_eq!(
        container.unmap(cut),
        Err(DeviceError::Cut { iova: cut, mapping }),
        "cut"
    );
    let nothing = range(IOVA + 0x20_0000, SIZE);
    demand_eq!(
        container.unmap(nothing),
        Err(DeviceError::NotMapped { iova: nothing }),
        "nothing"
    );
    demand_eq!(container.granules(), 2, "granules");
    let more = range(IOVA - 4 * SIZE, 64 * SIZE);
    unmapping(&[range(IOVA, 4 * SIZE)], || container.unmap(more))?;
    demand_eq!(container.granules(), 0, "granules at the end");
    demand_eq!(
        container.query()?.dma_avail,
        Some(65_535),
        "dma_avail at the end"
    );
    Ok(())
}

fn no_room() -> Outcome {
    const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    std::fs::write(LIMIT, "8")?;
    let opened = open();
    std::fs::write(LIMIT, "65535")?;
    let (_device, container) = opened?;
    let memory = Memory::anonymous(PAGE)?;
    // Four behind its back, so that it is the kernel that says no.
    for count in 0..4 {
        let at = IOVA + 0x10_0000 + count * SIZE;
        let mapped = raw::map(
            container.as_fd(),
            at,
            memory.address(),
            SIZE,
            raw::Rights::ReadWrite,
        );
        demand_eq!(mapped, Ok(()), "map behind its back");
    }
    let map = |count: u64| {
        container.map(
            range(IOVA + count * SIZE, SIZE),
            memory.range(),
            Rights::READ_WRITE,
        )
    };
    for count in 0..4 {
        demand_eq!(map(count), Ok(()), "map");
    }
    let full = map(4);
    demand!(
        matches!(full, Err(DeviceError::OutOfMappings { .. })),
        "one more: {full:?}"
    );
    demand_eq!(container.granules(), 4, "granules");
    unmapping(&[range(IOVA, 4 * SIZE)], || {
        container.unmap(range(IOVA, 4 * SIZE))
    })?;
    demand_eq!(map(4), Ok(()), "map afterwards");
    Ok(())
}

fn lock_limit() -> Outcome {
    child::run(|| {
        const LIMIT: u64 = 16 * SIZE;
        let (_device, container) = open()?;
        let memory = Memory::anonymous(32 * PAGE)?;
        child::become_unprivileged(LIMIT)?;
        let refused = container.map(range(IOVA, 32 * SIZE), memory.range(), Rights::READ_WRITE);
        let limited = matches!(refused, Err(DeviceError::LockLimit { limit: LIMIT, .. }));
        demand!(limited, "map of 32 pages: {refused:?}");
        demand_eq!(container.granules(), 0, "granules");
        Ok(())
    })
}

fn mismatch() -> Outcome {
    let (_device, container) = open()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    let iova = range(IOVA, 2 * SIZE);
    for nth in 0..2 {
        container.map(
            page(iova, nth),
            page(memory.range(), nth),
            Rights::READ_WRITE,
        )?;
    }
    demand_eq!(
        raw::unmap(container.as_fd(), IOVA, SIZE),
        Ok(SIZE),
        "unmap behind its back"
    );
    let noticed = container.unmap(iova);
    let mismatch = DeviceError::Mismatch {
        iova,
        expected: 2 * SIZE,
        unmapped: SIZE,
    };
    demand_eq!(noticed, Err(mismatch), "unmap");
    Ok(())
}

fn cost() -> Outcome {
    const TRIES: usize = 5;
    let (_device, container) = open()?;
    let memory = Memory::anonymous(PAGE)?;
    let mut text = String::new();
    for _ in 0..TRIES {
        let (ours, bare) = times(&container, &memory)?;
        let thousandths = 1000 * ours.as_nanos() / bare.as_nanos();
        text = format!(
            "{} ns, bare ioctls {} ns, ratio {}.{:03} (at most 1.1)",
            ours.as_nanos(),
            bare.as_nanos(),
            thousandths / 1000,
            thousandths % 1000
        );
        if thousandths <= 1100 {
            say(&Line::Figure("map and unmap of 4 KiB".into(), text));
            return Ok(());
        }
    }
    Err(Failure::NotSo(text))
}

/// What a map and an unmap take through the crate, and by bare ioctls: the medians of many, in turns, so that what else the
/// machine does hits both alike.
fn times(container: &Container, memory: &Memory) -> Result<(Duration, Duration), Failure> {
    const EACH: usize = 4096;
    let iova = range(IOVA, SIZE);
    let (mut ours, mut bare) = (Vec::with_capacity(EACH), Vec::with_capacity(EACH));
    for _ in 0..EACH {
        let begun = Instant::now();
        let mapped = raw::map(
            container.as_fd(),
            IOVA,
            memory.address(),
            SIZE,
            raw::Rights::ReadWrite,
        );
        let unmapped = raw::unmap(container.as_fd(), IOVA, SIZE);
        bare.push(begun.elapsed());
        demand_eq!((mapped, unmapped), (Ok(()), Ok(SIZE)), "bare ioctls");
        let begun = Instant::now();
        container.map(iova, memory.range(), Rights::READ_WRITE)?;
        container.unmap(iova)?;
        ours.push(begun.elapsed());
    }
    let median = |mut all: Vec<Duration>| *all.select_nth_unstable(EACH / 2).1;
    Ok((median(ours), median(bare)))
}
