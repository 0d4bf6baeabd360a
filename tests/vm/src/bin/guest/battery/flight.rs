//! DMA in flight while its translation goes: the IOMMU refuses it, and the memory stays as it is. And the negative control, in
//! which the unmap is left out.

use std::io::{Read, Write};
use std::time::Duration;

use shootdown_vm::protocol::{Iova, Line};

use crate::check::{Check, Failure, Outcome, demand, demand_eq};
use crate::edu::{CHUNK, Edu};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function};
use crate::port::say;
use crate::raw::Rights;

use super::child::Child;
use super::kernel::unmap;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "dma-into-mapped-memory-lands",
        run: lands,
    },
    Check {
        name: "dma-in-flight-at-unmap-faults-and-memory-stays",
        run: faults,
    },
    Check {
        name: "dma-in-flight-at-kill-9-never-lands-and-the-device-comes-back",
        run: killed,
    },
];

/// In this one guest and witness must both fail.
pub(crate) const CONTROL: &[Check] = &[Check {
    name: "control:an-unmap-is-left-out",
    run: left_out,
}];

const IOVA: u64 = 0x3000_0000;
const SIZE: u64 = PAGE as u64;
const RANGE: Iova = Iova {
    start: IOVA,
    len: SIZE,
};
const BEFORE: u8 = 0x5a;
const DMA: u8 = 0xa5;

/// A device whose buffer is full of [`DMA`], about to write it to memory that is full of [`BEFORE`].
fn armed(memory: &Memory) -> Result<Edu, Failure> {
    let edu = Edu::open()?;
    memory.fill(BEFORE);
    edu.load(DMA)?;
    demand_eq!(
        edu.container.map(IOVA, memory, Rights::ReadWrite),
        Ok(()),
        "map"
    );
    edu.arm_write(IOVA);
    Ok(edu)
}

fn lands() -> Outcome {
    let memory = Memory::anonymous(PAGE)?;
    let edu = armed(&memory)?;
    edu.finish()?;
    demand_eq!(memory.differs(0, CHUNK, DMA), None, "what the DMA wrote");
    demand_eq!(
        memory.differs(CHUNK, PAGE - CHUNK, BEFORE),
        None,
        "the memory behind it"
    );
    unmap(&edu.container, IOVA, SIZE)
}

fn faults() -> Outcome {
    let memory = Memory::anonymous(PAGE)?;
    let edu = armed(&memory)?;
    say(&Line::Faults(edu.function.requester(), RANGE));
    unmap(&edu.container, IOVA, SIZE)?;
    untouched(&edu, &memory)
}

fn left_out() -> Outcome {
    let memory = Memory::anonymous(PAGE)?;
    let edu = armed(&memory)?;
    say(&Line::Faults(edu.function.requester(), RANGE));
    say(&Line::Unmap(RANGE));
    say(&Line::Unmapped(RANGE));
    untouched(&edu, &memory)
}

/// The DMA was still to come when the memory was unmapped, and then it did not reach it.
fn untouched(edu: &Edu, memory: &Memory) -> Outcome {
    demand!(
        edu.busy(),
        "the DMA was over before the unmap was: this proves nothing"
    );
    edu.finish()?;
    demand_eq!(
        memory.differs(0, PAGE, BEFORE),
        None,
        "a DMA wrote to unmapped memory"
    );
    Ok(())
}

fn killed() -> Outcome {
    let memory = Memory::shared(PAGE)?;
    let (mut reader, writer) = std::io::pipe()?;
    let child = Child::fork(|| {
        let Ok(_edu) = armed(&memory) else { return 1 };
        let _ = (&writer).write_all(b"armed");
        loop {
            std::thread::sleep(Duration::from_secs(60));
        }
    })?;
    drop(writer);
    let mut word = [0; 5];
    let heard = reader.read_exact(&mut word);
    say(&Line::Faults(Function::find(EDU)?.requester(), RANGE));
    say(&Line::Unmap(RANGE));
    child.kill()?;
    say(&Line::Unmapped(RANGE));
    demand!(heard.is_ok(), "the child could not arm a DMA");
    demand_eq!(
        memory.differs(0, PAGE, BEFORE),
        None,
        "memory at the child's end"
    );
    let edu = Edu::open()?;
    demand_eq!(
        memory.differs(0, PAGE, BEFORE),
        None,
        "memory after the DMA's time"
    );
    edu.load(0x77)?;
    demand_eq!(edu.differs(0x77)?, None, "a DMA of the next driver");
    Ok(())
}
