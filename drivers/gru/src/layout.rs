//! The register layout of a chiplet, as the driver needs it.
//!
//! A chiplet is one window of 128 MiB: sixteen contexts at a stride of 4 MiB, management registers from 64 MiB on. All
//! offsets are in bytes, all registers have 64 bits. Handles share the low half of their first word: command, opcode,
//! status and cause.

use shootdown::PageSize;

/// Contexts of a chiplet.
pub(crate) const CONTEXTS: usize = 16;
/// TLB-global handles of a chiplet.
pub(crate) const PURGES: usize = 24;
/// Bytes of a segment, as its user sees it.
pub(crate) const SEGMENT_BYTES: u64 = 256 << 10;
/// Control blocks of one allocation unit.
pub(crate) const CBS_PER_UNIT: usize = 2;
/// Data bytes of one allocation unit.
pub(crate) const DATA_PER_UNIT: usize = 1024;
/// Words of a control block.
pub(crate) const CB_WORDS: usize = 8;
/// The fault map, and interrupt vector, that all contexts report to.
pub(crate) const FAULT_MAP: u32 = 0;

const MANAGEMENT: u64 = 64 << 20;
const STRIDE: u64 = 256;

/// Word `word` of control block `cb` of a context.
pub(crate) const fn control_block(context: usize, cb: usize, word: usize) -> u64 {
    ((context as u64) << 22) + cb as u64 * STRIDE + word as u64 * 8
}

/// The data segment's word at byte `offset`.
pub(crate) const fn data(context: usize, offset: usize) -> u64 {
    ((context as u64) << 22) + 0x2_0000 + offset as u64
}

/// Words of a fault map with the faults; as many with the completions follow.
pub(crate) const MAP_WORDS: usize = 2;

/// Word `word` of the fault map in use.
pub(crate) const fn fault_map(word: usize) -> u64 {
    MANAGEMENT + FAULT_MAP as u64 * STRIDE + word as u64 * 8
}

/// The first word of a TLB-global handle.
pub(crate) const fn purge(index: usize) -> u64 {
    MANAGEMENT + 0x8000 + index as u64 * STRIDE
}

/// Word `word` of an extended control block.
pub(crate) const fn extended(slot: usize, word: usize) -> u64 {
    MANAGEMENT + 0x1_0000 + slot as u64 * STRIDE + word as u64 * 8
}

/// Words of an extended control block.
pub(crate) mod cbe {
    pub(crate) const CAUSE: usize = 1;
    pub(crate) const DETAIL: usize = 2;
    pub(crate) const ADDRESS: usize = 3;
    /// Those that belong to a context's state: causes, detail, address, and the next element.
    pub(crate) const STATE: std::ops::Range<usize> = 1..5;
    /// Opcode and element type.
    pub(crate) const COPY: usize = 5;
    pub(crate) const BASE0: usize = 6;
    pub(crate) const BASE1: usize = 7;
    /// Elements that are left, and the cache lines of the first address that they lie in.
    pub(crate) const LEFT: usize = 8;

    /// Bytes that a block copy has yet to read, from `from` on, and to write.
    pub(crate) const fn left(copy: u64, from: u64, left: u64) -> [u64; 2] {
        const LINE: u64 = 64;
        let (elements, lines) = (left & 0xffff_ffff, left >> 32);
        let reads = (lines * LINE).saturating_sub(from % LINE);
        [reads, elements << ((copy >> 12) & 7)]
    }
}

/// Whether the first word of a control block, or its copy, is a block copy's.
pub(crate) const fn is_block_copy(dw0: u64) -> bool {
    (dw0 >> 8) & 0xf == 1
}

/// The first word of a TLB fault handle.
pub(crate) const fn fault(slot: usize) -> u64 {
    MANAGEMENT + 0x1_8000 + slot as u64 * STRIDE
}

/// The first word of a context configuration handle.
pub(crate) const fn configuration(context: usize) -> u64 {
    MANAGEMENT + 0x2_0000 + context as u64 * STRIDE
}

/// Write 1 to reset the chiplet; reads 1 until that is done.
pub(crate) const RESET: u64 = MANAGEMENT + 0x3_0000;

/// Status of handles and control blocks.
pub(crate) mod status {
    pub(crate) const IDLE: u64 = 0;
    pub(crate) const EXCEPTION: u64 = 1;
    pub(crate) const ACTIVE: u64 = 2;
    pub(crate) const CALL_OS: u64 = 3;

    /// The status in a first word.
    pub(crate) const fn of(dw0: u64) -> u64 {
        (dw0 >> 16) & 3
    }

    /// What became of a message, in a control block's first word.
    pub(crate) const fn substatus(dw0: u64) -> u64 {
        (dw0 >> 32) & 0x3f
    }

    /// The first word of an instruction that has ended, to start it once more.
    pub(crate) const fn again(dw0: u64) -> u64 {
        (dw0 & !(3 << 16) & !(0x3f << 32)) | (ACTIVE << 16) | 1
    }

    /// The cause in a handle's first word.
    pub(crate) const fn cause(dw0: u64) -> u64 {
        (dw0 >> 20) & 0xf
    }
}

/// The first word that starts operation `opcode` of a handle.
pub(crate) const fn start(opcode: u64) -> u64 {
    1 | (opcode << 8) | (status::ACTIVE << 16)
}

/// Context configuration handles.
pub(crate) mod cch {
    pub(crate) const START: u64 = 1;
    pub(crate) const ALLOCATE: u64 = 2;
    pub(crate) const DEALLOCATE: u64 = 4;
    pub(crate) const INTERRUPT_SYNC: u64 = 5;
    /// State: it owns nothing, and does not run.
    pub(crate) const INACTIVE: u64 = 0;
    pub(crate) const fn state(dw0: u64) -> u64 {
        (dw0 >> 24) & 3
    }

    /// Cause: an unresolved fault locks the context.
    pub(crate) const LOCKED: u64 = 5;
    /// TLB misses go to the fault map.
    pub(crate) const TLB_INTERRUPT: u64 = 1 << 34;
    /// TLB misses go to the fault map without an interrupt.
    pub(crate) const FAULT_BITS: u64 = 1 << 35;
    /// Completions that ask for it interrupt.
    pub(crate) const CB_INTERRUPT: u64 = 1 << 33;
    /// Instructions may name memory itself.
    pub(crate) const UNMAP_ENABLE: u64 = 1 << 32;
    /// Cause: not in this state.
    pub(crate) const WRONG_STATE: u64 = 2;
    pub(crate) const DATA_MAP: u64 = 8;
    pub(crate) const CB_MAP: u64 = 16;
    pub(crate) const REGIONS: std::ops::Range<u64> = 3..11;
    pub(crate) const OWNER: u64 = 88;

    /// The word of a region: its ASID, and the page sizes 4 KiB, 64 KiB and 2 MiB.
    pub(crate) const fn region(asid: u32) -> u64 {
        asid as u64 | (0b10_0101 << 32)
    }
}

/// TLB-global handles.
pub(crate) mod tgh {
    pub(crate) const INVALIDATE: u64 = 1;
    pub(crate) const ADDRESS: u64 = 8;
    pub(crate) const WHAT: u64 = 16;
    pub(crate) const WHERE: u64 = 24;
    /// Whether an idle handle has ended what it was told to do. A reset takes the opcode of one that is at work.
    pub(crate) const fn has_ended(dw0: u64) -> bool {
        (dw0 >> 8) & 7 == INVALIDATE
    }

    /// Pages that one purge covers at most; so many purge the ASID completely.
    pub(crate) const PAGES: u64 = 1024;

    /// What is purged: `pages` pages of size `code` of `asid`, or of every ASID.
    pub(crate) const fn what(asid: Option<u32>, code: u64, pages: u64) -> u64 {
        let which = match asid {
            Some(asid) => asid as u64,
            None => 1 << 29,
        };
        which | (code << 24) | ((pages - 1) << 32)
    }

    /// In which contexts; all address bits are compared.
    pub(crate) const fn contexts(bitmap: u16) -> u64 {
        ((bitmap as u64) << 40) | ((1 << 39) - 1)
    }
}

/// TLB fault handles.
pub(crate) mod tfh {
    pub(crate) const WRITE_ONLY: u64 = 2;
    pub(crate) const WRITE_RESTART: u64 = 3;
    pub(crate) const EXCEPTION: u64 = 4;
    pub(crate) const USER_POLLING: u64 = 7;
    pub(crate) const MISS_ADDRESS: u64 = 8;
    pub(crate) const FILL_ADDRESS: u64 = 24;
    pub(crate) const FILL: u64 = 32;
    pub(crate) const FRAME: u64 = 40;
    /// State: waits for its user.
    pub(crate) const MISS_USER: u64 = 2;
    /// State: reported by the fault map.
    pub(crate) const MISS_MAP: u64 = 3;
    /// Cause: a store through an entry that does not allow it.
    pub(crate) const MODIFY: u64 = 2;

    /// The state in the first word.
    pub(crate) const fn state(dw0: u64) -> u64 {
        (dw0 >> 24) & 7
    }

    /// The entry's attributes.
    pub(crate) const fn fill(asid: u32, code: u64, writable: bool) -> u64 {
        asid as u64 | (code << 32) | ((writable as u64) << 37)
    }
}

/// The hardware's code of a page size.
pub(crate) const fn page_code(page: PageSize) -> u64 {
    let shift = page.shift();
    ((if shift > 20 { shift + 2 } else { shift }) as u64 >> 1) - 6
}

/// The control-block slots of a map of allocation units, in the order of the context's own numbers.
pub(crate) fn slots(map: u64) -> impl Iterator<Item = usize> {
    (0..64)
        .filter(move |unit| map & (1 << unit) != 0)
        .flat_map(|unit| [unit * CBS_PER_UNIT, unit * CBS_PER_UNIT + 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_codes_are_those_of_the_data_sheet() {
        let codes = PageSize::ALL.map(page_code);
        assert_eq!(codes, [0, 2, 5]);
        for code in codes {
            assert_ne!(cch::region(0) & (1 << (32 + code)), 0);
        }
    }

    #[test]
    fn a_context_counts_its_own_control_blocks() {
        assert_eq!(slots(0b101).collect::<Vec<_>>(), [0, 1, 4, 5]);
    }
}
