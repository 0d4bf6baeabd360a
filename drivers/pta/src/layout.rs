//! The registers. The only file that knows them: another device's go here.

/// A field of a register: its lowest bit, and how many it has.
#[derive(Clone, Copy)]
pub(crate) struct Field(u32, u32);

impl Field {
    pub(crate) const fn get(self, word: u64) -> u64 {
        word >> self.0 & (u64::MAX >> (64 - self.1))
    }

    pub(crate) const fn of(self, value: u64) -> u64 {
        (value & (u64::MAX >> (64 - self.1))) << self.0
    }
}

pub(crate) const IDENTIFICATION: u64 = 0x00;
pub(crate) const WHO: u64 = 0x7074_6101;
/// Write 1; reads 1 until it is over.
pub(crate) const RESET: u64 = 0x08;
/// Tables in local memory.
pub(crate) const TABLES: u64 = 0x10;
/// PASIDs, 0 among them, which is none.
pub(crate) const PASID_LIMIT: u64 = 0x18;

/// Page requests: a ring of two words an entry, and what answers them.
pub(crate) mod request {
    use super::Field;

    pub(crate) const HEAD: u64 = 0x40;
    pub(crate) const TAIL: u64 = 0x48;
    /// Bit 0: one found no room. Write 1 to clear.
    pub(crate) const STATUS: u64 = 0x50;
    pub(crate) const RESPONSE: u64 = 0x58;
    pub(crate) const SIZE: u64 = 0x60;
    pub(crate) const RING: u64 = 0x1000;
    pub(crate) const GROUP: Field = Field(32, 16);
    pub(crate) const RETRY: u64 = 0;
    pub(crate) const INVALID: u64 = 1;
    pub(crate) const VECTOR: u32 = 0;
}

/// Invalidations of the device TLB.
pub(crate) mod invalidate {
    use super::Field;

    pub(crate) const ADDRESS: u64 = 0x80;
    /// Write: queues. Read: the room that is left.
    pub(crate) const QUEUE: u64 = 0x88;
    pub(crate) const DOORBELL: u64 = 0x90;
    /// Read: the next completion, or 0.
    pub(crate) const COMPLETION: u64 = 0x98;
    pub(crate) const SCOPE: Field = Field(0, 2);
    pub(crate) const PAGES: u64 = 0;
    pub(crate) const ONE_PASID: u64 = 1;
    pub(crate) const EVERYTHING: u64 = 2;
    pub(crate) const HUGE: Field = Field(2, 1);
    pub(crate) const COUNT: Field = Field(32, 16);
    /// Pages of one command.
    pub(crate) const MOST: u64 = 1 << 16;
}

pub(crate) const PASID: Field = Field(8, 20);
pub(crate) const ENABLE: Field = Field(0, 1);
/// Disabled, and an access is still in flight.
pub(crate) const BUSY: Field = Field(1, 1);

/// The PASID table's entry: the root of the page table, and, one word on, what the device calls the address space.
pub(crate) const fn pasid_entry(pasid: u64) -> u64 {
    0x2000 + pasid * 16
}

/// Work queues.
pub(crate) const QUEUES: usize = 64;

pub(crate) const fn queue_control(queue: usize) -> u64 {
    0x3000 + queue as u64 * 8
}

/// Page tables in local memory.
pub(crate) mod table {
    use super::Field;

    pub(crate) const LEVELS: u32 = 4;
    pub(crate) const ENTRIES: usize = 512;
    pub(crate) const READ: Field = Field(0, 1);
    pub(crate) const WRITE: Field = Field(1, 1);
    pub(crate) const TABLE: Field = Field(2, 1);
    pub(crate) const LEAF: Field = Field(3, 1);
    pub(crate) const NUMBER: Field = Field(12, 40);

    /// log2 of the bytes that an entry of this level is for.
    pub(crate) const fn span(level: u32) -> u32 {
        12 + 9 * level
    }

    /// The entry of a table that is for an address.
    pub(crate) const fn index(level: u32, address: u64) -> usize {
        (address >> span(level)) as usize % ENTRIES
    }

    pub(crate) const fn entry(table: u64, index: usize) -> u64 {
        0x100_0000 + table * 4096 + index as u64 * 8
    }
}

/// Slots of a portal.
pub(crate) mod slot {
    use super::Field;

    pub(crate) const SLOTS: usize = 16;
    pub(crate) const PORTAL_BYTES: u64 = 4096;

    pub(crate) const fn word(queue: usize, slot: usize, word: usize) -> u64 {
        0x10_0000 + queue as u64 * PORTAL_BYTES + slot as u64 * 64 + word as u64 * 8
    }

    pub(crate) const RESULT: usize = 5;
    pub(crate) const FAULT: usize = 6;
    pub(crate) const DONE_BYTES: usize = 7;
    pub(crate) const FOR_WRITE: Field = Field(8, 1);
    pub(crate) const STATUS: Field = Field(32, 8);
    pub(crate) const CAUSE: Field = Field(40, 8);
    pub(crate) const IDLE: u64 = 0;
    pub(crate) const ACTIVE: u64 = 1;
    pub(crate) const DONE: u64 = 2;
    pub(crate) const PAGE_FAULT: u64 = 2;
    pub(crate) const DISABLED: u64 = 4;
}
