//! What type1 v2 makes of maps and unmaps, right and wrong ones. The transport rests on each of these.

use std::time::Instant;

use shootdown_vm::protocol::{Iova, Line};

use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function, RNG};
use crate::port::say;
use crate::raw::{Container, Refused, Rights};

pub(crate) const CHECKS: &[Check] = &[
    check("an-overlapping-map-is-eexist", overlap),
    check("a-misaligned-or-empty-map-is-einval", misaligned),
    check("a-map-into-the-msi-window-is-einval", msi_window),
    check("a-map-of-memory-that-is-not-there-is-efault", no_memory),
    check("a-map-for-writing-of-read-only-memory-is-efault", read_only),
    check(
        "an-unmap-that-cuts-a-mapping-is-einval-and-leaves-size",
        cut,
    ),
    check("an-unmap-of-more-than-is-mapped-gives-the-sum", more),
    check("an-unmap-of-nothing-succeeds-with-size-0", nothing),
    check("unmap-all-clears-all", all),
    check("64-mib-in-4-kib-granules-go-in-one-unmap", granules),
    check("dma-avail-counts-down-and-up", available),
    check("65535-mappings-and-one-more-is-enospc", limit),
    check(
        "capabilities-name-ranges-migration-and-dma-avail",
        capabilities,
    ),
    check("an-unmap-flushes-the-ats-cache-too", ats),
    check("memory-beyond-rlimit-memlock-is-enomem", memlock),
];

const IOVA: u64 = 0x1000_0000;
const SIZE: u64 = PAGE as u64;

fn container() -> Result<Container, Failure> {
    Ok(Container::of(&Function::find(EDU)?)?)
}

/// Unmaps, and says so to the witness.
pub(crate) fn unmap(container: &Container, iova: u64, len: u64) -> Outcome {
    let range = Iova::new(iova, len)
        .ok_or_else(|| Failure::Error(format!("no range: {iova:#x} {len:#x}")))?;
    say(&Line::Unmap(range));
    let unmapped = container.unmap(iova, len);
    say(&Line::Unmapped(range));
    demand_eq!(unmapped, Ok(len), "unmap");
    Ok(())
}

fn overlap() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let map = |iova| container.map(iova, &memory, Rights::ReadWrite);
    demand_eq!(map(IOVA), Ok(()), "the first map");
    for iova in [IOVA, IOVA + SIZE, IOVA - SIZE] {
        demand_eq!(map(iova), Err(libc::EEXIST), format!("map at {iova:#x}"));
    }
    demand_eq!(map(IOVA + 4 * SIZE), Ok(()), "a map beside it");
    unmap(&container, IOVA, 8 * SIZE)
}

fn misaligned() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    let address = memory.address();
    for (iova, address, size) in [
        (IOVA + 1, address, SIZE),
        (IOVA, address + 1, SIZE),
        (IOVA, address, SIZE - 1),
        (IOVA, address, 0),
        (u64::MAX - SIZE + 1, address, 2 * SIZE),
    ] {
        let mapped = container.map_at(iova, address, size, Rights::ReadWrite);
        demand_eq!(
            mapped,
            Err(libc::EINVAL),
            format!("map {iova:#x} {address:#x} {size:#x}")
        );
    }
    Ok(())
}

fn msi_window() -> Outcome {
    const WINDOW: u64 = 0xfee0_0000;
    let container = container()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    for iova in [WINDOW, WINDOW + 0xf_f000, WINDOW - SIZE] {
        let mapped = container.map(iova, &memory, Rights::ReadWrite);
        demand_eq!(mapped, Err(libc::EINVAL), format!("map at {iova:#x}"));
    }
    demand_eq!(
        container.map(WINDOW - 2 * SIZE, &memory, Rights::ReadWrite),
        Ok(()),
        "a map below it"
    );
    unmap(&container, WINDOW - 2 * SIZE, 2 * SIZE)
}

fn no_memory() -> Outcome {
    let container = container()?;
    let address = Memory::anonymous(PAGE)?.address();
    // The memory went with the statement; nothing else is mapped between.
    demand_eq!(
        container.map_at(IOVA, address, SIZE, Rights::ReadWrite),
        Err(libc::EFAULT),
        "map"
    );
    demand_eq!(
        container.unmap(IOVA, SIZE),
        Ok(0),
        "what the refused map left behind"
    );
    Ok(())
}

fn read_only() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(PAGE)?;
    memory.fill(1);
    memory.protect(libc::PROT_READ)?;
    demand_eq!(
        container.map(IOVA, &memory, Rights::ReadWrite),
        Err(libc::EFAULT),
        "map for writing"
    );
    demand_eq!(
        container.map(IOVA, &memory, Rights::Read),
        Ok(()),
        "map for reading"
    );
    unmap(&container, IOVA, SIZE)
}

fn cut() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    demand_eq!(
        container.map(IOVA, &memory, Rights::ReadWrite),
        Ok(()),
        "map"
    );
    for (iova, size) in [
        (IOVA, SIZE),
        (IOVA + SIZE, SIZE),
        (IOVA + 3 * SIZE, 2 * SIZE),
        (IOVA - SIZE, 2 * SIZE),
    ] {
        let refused = Err(Refused {
            errno: libc::EINVAL,
            size,
        });
        demand_eq!(
            container.unmap(iova, size),
            refused,
            format!("unmap {iova:#x} {size:#x}")
        );
    }
    unmap(&container, IOVA, 4 * SIZE)
}

fn more() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(PAGE)?;
    for page in [0, 2, 5] {
        demand_eq!(
            container.map(IOVA + page * SIZE, &memory, Rights::ReadWrite),
            Ok(()),
            "map"
        );
    }
    for page in [0, 2, 5] {
        let iova = IOVA + page * SIZE;
        say(&Line::Unmap(Iova {
            start: iova,
            len: SIZE,
        }));
    }
    demand_eq!(
        container.unmap(IOVA - SIZE, 16 * SIZE),
        Ok(3 * SIZE),
        "unmap"
    );
    for page in [0, 2, 5] {
        let iova = IOVA + page * SIZE;
        say(&Line::Unmapped(Iova {
            start: iova,
            len: SIZE,
        }));
    }
    Ok(())
}

fn nothing() -> Outcome {
    let container = container()?;
    demand_eq!(container.unmap(IOVA, SIZE), Ok(0), "unmap");
    let memory = Memory::anonymous(PAGE)?;
    demand_eq!(
        container.map(IOVA, &memory, Rights::ReadWrite),
        Ok(()),
        "map"
    );
    unmap(&container, IOVA, SIZE)?;
    demand_eq!(container.unmap(IOVA, SIZE), Ok(0), "the second unmap");
    Ok(())
}

fn all() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    let places = [0, IOVA, 0x1_0000_0000, 0x7f_0000_0000];
    for iova in places {
        demand_eq!(
            container.map(iova, &memory, Rights::ReadWrite),
            Ok(()),
            format!("map at {iova:#x}")
        );
    }
    let ranges = places.map(|start| Iova {
        start,
        len: 2 * SIZE,
    });
    ranges.iter().for_each(|range| say(&Line::Unmap(*range)));
    demand_eq!(
        container.unmap_all(),
        Ok(2 * SIZE * places.len() as u64),
        "unmap all"
    );
    ranges.iter().for_each(|range| say(&Line::Unmapped(*range)));
    for iova in places {
        demand_eq!(
            container.map(iova, &memory, Rights::ReadWrite),
            Ok(()),
            format!("map at {iova:#x} again")
        );
    }
    Ok(())
}

fn granules() -> Outcome {
    const LEN: usize = 64 << 20;
    let container = container()?;
    let memory = Memory::anonymous(LEN)?;
    let begun = Instant::now();
    for page in 0..(LEN / PAGE) as u64 {
        let mapped = container.map_at(
            IOVA + page * SIZE,
            memory.address() + page * SIZE,
            SIZE,
            Rights::ReadWrite,
        );
        demand_eq!(mapped, Ok(()), format!("map of page {page}"));
    }
    let mapped = begun.elapsed();
    let begun = Instant::now();
    unmap(&container, IOVA, LEN as u64)?;
    say(&Line::Figure(
        "64 MiB in 4 KiB granules, bare ioctls".into(),
        format!(
            "map {} ms in {} calls, unmap {} ms in 1",
            mapped.as_millis(),
            LEN / PAGE,
            begun.elapsed().as_millis()
        ),
    ));
    Ok(())
}

fn available() -> Outcome {
    let container = container()?;
    let memory = Memory::anonymous(PAGE)?;
    let available = || -> Result<u32, Failure> {
        container
            .info()?
            .dma_avail
            .ok_or_else(|| Failure::NotSo("no dma_avail".into()))
    };
    let before = available()?;
    demand_eq!(before, 65_535, "dma_avail of an empty container");
    for count in 1..=3 {
        let iova = IOVA + u64::from(count) * SIZE;
        demand_eq!(
            container.map(iova, &memory, Rights::ReadWrite),
            Ok(()),
            "map"
        );
        demand_eq!(available()?, before - count, "dma_avail");
    }
    unmap(&container, IOVA + SIZE, 3 * SIZE)?;
    demand_eq!(available()?, before, "dma_avail at the end");
    Ok(())
}

fn limit() -> Outcome {
    const LIMIT: u64 = 65_535;
    let container = container()?;
    let memory = Memory::anonymous(PAGE)?;
    let begun = Instant::now();
    // One page everywhere: mappings are counted, not memory.
    for count in 0..LIMIT {
        let mapped = container.map(IOVA + count * SIZE, &memory, Rights::ReadWrite);
        demand_eq!(mapped, Ok(()), format!("map {count}"));
    }
    let each = begun.elapsed() / LIMIT as u32;
    say(&Line::Figure(
        "map of 4 KiB, bare ioctl".into(),
        format!("{} ns", each.as_nanos()),
    ));
    let one_more = container.map(IOVA + LIMIT * SIZE, &memory, Rights::ReadWrite);
    demand_eq!(one_more, Err(libc::ENOSPC), "one more");
    unmap(&container, IOVA, LIMIT * SIZE)?;
    demand_eq!(
        container.map(IOVA, &memory, Rights::ReadWrite),
        Ok(()),
        "a map afterwards"
    );
    Ok(())
}

fn capabilities() -> Outcome {
    let info = container()?.info()?;
    for (id, name) in [(1, "IOVA ranges"), (2, "migration"), (3, "dma_avail")] {
        demand!(
            info.capabilities.contains(&id),
            "no capability {id}, {name}, in {:?}",
            info.capabilities
        );
    }
    demand!(
        info.page_sizes & SIZE != 0,
        "no 4 KiB pages in {:#x}",
        info.page_sizes
    );
    let msi = 0xfee0_0000_u64..=0xfeef_ffff;
    for &(first, last) in &info.ranges {
        demand!(
            last < *msi.start() || first > *msi.end(),
            "{first:#x}..={last:#x} has the MSI window in it"
        );
    }
    demand!(info.ranges.len() >= 2, "IOVA ranges: {:x?}", info.ranges);
    Ok(())
}

fn ats() -> Outcome {
    let function = Function::find(RNG)?;
    let container = Container::of(&function)?;
    let _device = container.device(&function)?;
    let memory = Memory::anonymous(8 * PAGE)?;
    say(&Line::Ats(function.requester()));
    for len in [1, 2, 8] {
        let mapped = container.map_at(IOVA, memory.address(), len * SIZE, Rights::ReadWrite);
        demand_eq!(mapped, Ok(()), "map");
        unmap(&container, IOVA, len * SIZE)?;
    }
    Ok(())
}

/// In a child: PID 1 may lock what it likes.
fn memlock() -> Outcome {
    super::child::run(|| {
        const LIMIT: u64 = 16 * SIZE;
        let container = container()?;
        let memory = Memory::anonymous(32 * PAGE)?;
        super::child::become_unprivileged(LIMIT)?;
        demand_eq!(
            container.map(IOVA, &memory, Rights::ReadWrite),
            Err(libc::ENOMEM),
            "map of 32 pages"
        );
        let part = container.map_at(IOVA, memory.address(), LIMIT / 2, Rights::ReadWrite);
        demand_eq!(part, Ok(()), "map of 8 pages");
        Ok(())
    })
}
