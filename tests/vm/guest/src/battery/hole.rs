//! The hole that shootdown closes: the process changes its memory, and the device goes on with what was there. No fault, no
//! word from the kernel. The witness sees no fault either: none is announced here.

use crate::bare::Bare;
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::edu::CHUNK;
use crate::memory::{Memory, PAGE};
use crate::raw::Rights;

use super::kernel::unmap;

pub(crate) const CHECKS: &[Check] = &[
    check("hole:the-device-reads-memory-that-was-unmapped", unmapped),
    check(
        "hole:after-discard-device-and-cpu-see-different-pages",
        discarded,
    ),
    check(
        "hole:the-device-writes-memory-that-was-made-read-only",
        protected,
    ),
    check(
        "hole:after-remap-the-iova-follows-the-page-not-the-address",
        remapped,
    ),
];

const IOVA: u64 = 0x2000_0000;
const SIZE: u64 = PAGE as u64;

fn mapped(byte: u8) -> Result<(Bare, Memory), Failure> {
    let bare = Bare::open()?;
    let memory = Memory::anonymous(PAGE)?;
    memory.fill(byte);
    demand_eq!(
        bare.container.map(IOVA, &memory, Rights::ReadWrite),
        Ok(()),
        "map"
    );
    Ok((bare, memory))
}

fn unmapped() -> Outcome {
    let (bare, memory) = mapped(0x11)?;
    bare.load(0xee)?;
    drop(memory);
    bare.edu.read(IOVA, CHUNK)?;
    demand_eq!(bare.differs(0x11)?, None, "what the device read");
    unmap(&bare.container, IOVA, SIZE)
}

fn discarded() -> Outcome {
    let (bare, memory) = mapped(0x22)?;
    memory.advise(libc::MADV_DONTNEED)?;
    demand_eq!(memory.differs(0, PAGE, 0), None, "what the CPU reads");
    bare.load(0xee)?;
    bare.edu.read(IOVA, CHUNK)?;
    demand_eq!(bare.differs(0x22)?, None, "what the device reads");
    bare.edu.write(IOVA, CHUNK)?;
    demand_eq!(
        memory.differs(0, PAGE, 0),
        None,
        "what the CPU reads after the device wrote"
    );
    unmap(&bare.container, IOVA, SIZE)
}

fn protected() -> Outcome {
    let (bare, memory) = mapped(0x33)?;
    bare.load(0x44)?;
    memory.protect(libc::PROT_READ)?;
    bare.edu.write(IOVA, CHUNK)?;
    demand_eq!(memory.differs(0, CHUNK, 0x44), None, "read-only memory");
    unmap(&bare.container, IOVA, SIZE)
}

fn remapped() -> Outcome {
    let (bare, mut memory) = mapped(0x55)?;
    bare.load(0x66)?;
    let before = memory.address();
    memory.remap()?;
    demand!(memory.address() != before, "the memory did not move");
    bare.edu.write(IOVA, CHUNK)?;
    demand_eq!(
        memory.differs(0, CHUNK, 0x66),
        None,
        "the page at its new address"
    );
    unmap(&bare.container, IOVA, SIZE)
}
