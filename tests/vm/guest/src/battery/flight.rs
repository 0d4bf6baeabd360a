//! DMA in flight while its translation goes: the IOMMU refuses it, and the memory stays as it is. And the negative control, in
//! which the unmap is left out.

use std::io::{Read, Write};
use std::time::Duration;

use shootdown_vm::protocol::{Iova, Line};

use crate::bare::Bare;
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::edu::CHUNK;
use crate::memory::{Memory, PAGE};
use crate::port::say;
use crate::raw::Rights;

use super::child::Child;
use super::kernel::unmap;
use super::rig::{Rig, in_flight, race};

pub(crate) const CHECKS: &[Check] = &[
    check("dma-into-mapped-memory-lands", lands),
    check("dma-in-flight-at-unmap-faults-and-memory-stays", faults),
    check(
        "dma-in-flight-at-kill-9-never-lands-and-the-device-comes-back",
        killed,
    ),
];

/// In this one guest and witness must both fail.
pub(crate) const CONTROL: &[Check] = &[check("control:an-unmap-is-left-out", left_out)];

const IOVA: u64 = 0x3000_0000;
const SIZE: u64 = PAGE as u64;
const RANGE: Iova = Iova {
    start: IOVA,
    len: SIZE,
};
const BEFORE: u8 = 0x5a;
const DMA: u8 = 0xa5;

/// A device whose buffer is full of [`DMA`], about to write it to memory that is full of [`BEFORE`].
fn armed(memory: &Memory) -> Result<Bare, Failure> {
    let bare = Bare::open()?;
    memory.fill(BEFORE);
    bare.load(DMA)?;
    demand_eq!(
        bare.container.map(IOVA, memory, Rights::ReadWrite),
        Ok(()),
        "map"
    );
    bare.edu.arm_write(IOVA, CHUNK)?;
    Ok(bare)
}

fn lands() -> Outcome {
    let memory = Memory::anonymous(PAGE)?;
    let bare = armed(&memory)?;
    bare.edu.finish()?;
    demand_eq!(memory.differs(0, CHUNK, DMA), None, "what the DMA wrote");
    demand_eq!(
        memory.differs(CHUNK, PAGE - CHUNK, BEFORE),
        None,
        "the memory behind it"
    );
    unmap(&bare.container, IOVA, SIZE)
}

fn faults() -> Outcome {
    race(|| {
        let memory = Memory::anonymous(PAGE)?;
        let bare = armed(&memory)?;
        unmap(&bare.container, IOVA, SIZE)?;
        if !in_flight(&bare.edu, bare.function.requester(), RANGE)? {
            return Ok(None);
        }
        untouched(&bare, &memory).map(Some)
    })
}

fn left_out() -> Outcome {
    let memory = Memory::anonymous(PAGE)?;
    let bare = armed(&memory)?;
    say(&Line::Faults(bare.function.requester(), RANGE));
    say(&Line::Unmap(RANGE));
    say(&Line::Unmapped(RANGE));
    untouched(&bare, &memory)
}

/// After the DMA's time memory is as it was.
fn untouched(bare: &Bare, memory: &Memory) -> Outcome {
    bare.edu.finish()?;
    demand_eq!(
        memory.differs(0, PAGE, BEFORE),
        None,
        "memory that was unmapped before a DMA to it"
    );
    Ok(())
}

fn killed() -> Outcome {
    race(|| {
        let memory = Memory::shared(PAGE)?;
        let (mut reader, writer) = std::io::pipe()?;
        let child = Child::fork(|| {
            let Ok(_bare) = armed(&memory) else { return 1 };
            let _ = (&writer).write_all(b"armed");
            loop {
                std::thread::sleep(Duration::from_secs(60));
            }
        })?;
        drop(writer);
        let mut word = [0; 5];
        let heard = reader.read_exact(&mut word);
        say(&Line::Unmap(RANGE));
        child.kill()?;
        say(&Line::Unmapped(RANGE));
        demand!(heard.is_ok(), "the child could not arm a DMA");
        if memory.differs(0, PAGE, BEFORE).is_some() {
            return Ok(None);
        }
        // The kernel took the device's bus mastering with the descriptor: the DMA does not even come to a fault. After its time
        // the next driver may switch it on again.
        std::thread::sleep(Duration::from_millis(300));
        demand_eq!(
            memory.differs(0, PAGE, BEFORE),
            None,
            "memory after the DMA's time"
        );
        let rig = Rig::new()?;
        let next = rig.pages(1)?;
        rig.lands(&rig.window(next, SIZE)?, next)?;
        Ok(Some(()))
    })
}
