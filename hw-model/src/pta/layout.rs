//! The data sheet in numbers: byte offsets of registers, and the fields of what is in them. All registers are 64 bits wide.

/// A field of a register.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    shift: u32,
    bits: u32,
}

impl Field {
    const fn new(shift: u32, bits: u32) -> Self {
        Self { shift, bits }
    }

    const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    /// Its value in `word`.
    pub const fn get(self, word: u64) -> u64 {
        word >> self.shift & self.mask()
    }

    /// `word` with another value in it. Higher bits of `value` are dropped.
    pub const fn put(self, word: u64, value: u64) -> u64 {
        word & !(self.mask() << self.shift) | (value & self.mask()) << self.shift
    }
}

/// PASIDs, 1 to this less one; 0 is none.
pub const PASIDS: usize = 64;
/// Work queues.
pub const QUEUES: usize = 64;
/// Commands of a queue that can be under way.
pub const SLOTS: usize = 16;
/// Entries of the page-request ring at most.
pub const REQUESTS: usize = 64;
/// Entries of a table.
pub const ENTRIES: usize = 512;
/// Levels of a page table; the root is of level 3, a table of level 0 has pages of 4 KiB.
pub const LEVELS: u32 = 4;

/// What the device is. Read only: [`WHO`].
pub const IDENTIFICATION: u64 = 0x00;
/// What [`IDENTIFICATION`] holds: "pta", revision 1.
pub const WHO: u64 = 0x7074_6101;
/// Write 1 to reset. Reads 1 until that is over.
pub const RESET: u64 = 0x08;
/// How many tables local memory has room for. Read only.
pub const TABLES: u64 = 0x10;
/// How many PASIDs there are, 0 among them. Read only.
pub const PASID_LIMIT: u64 = 0x18;

/// The next page request that software takes: written by software. An index of the ring.
pub const REQUEST_HEAD: u64 = 0x40;
/// Where the device puts the next: read only. Equal to the head where there is none.
pub const REQUEST_TAIL: u64 = 0x48;
/// Bit 0: a request did not find room and was dropped. Write 1 to clear.
pub const REQUEST_STATUS: u64 = 0x50;
/// Write: answers a group ([`PASID`], [`GROUP`], [`RESPONSE`]).
pub const REQUEST_RESPONSE: u64 = 0x58;
/// Entries of the ring. Read only.
pub const REQUEST_SIZE: u64 = 0x60;

/// The first page of the invalidation that is queued next.
pub const INVALIDATE_ADDRESS: u64 = 0x80;
/// Write: queues an invalidation ([`SCOPE`], [`HUGE`], [`PASID`], [`COUNT`]). Read: how many more find room.
pub const INVALIDATE: u64 = 0x88;
/// Write: begins what is queued; its completion will be the number that is written.
pub const INVALIDATE_DOORBELL: u64 = 0x90;
/// Read: takes the next completion; 0 where there is none.
pub const INVALIDATE_COMPLETION: u64 = 0x98;
/// Invalidations that can be queued.
pub const INVALIDATIONS: usize = 16;

/// The page-request ring: two words an entry.
pub const REQUEST_RING: u64 = 0x1000;
/// The PASID table: two words an entry ([`ENABLE`], [`BUSY`], [`NUMBER`] of the root table; the address space).
pub const PASID_TABLE: u64 = 0x2000;
/// Control of the work queues: a word each ([`ENABLE`], [`BUSY`], [`PASID`]).
pub const QUEUE_CONTROL: u64 = 0x3000;
/// Portals of the work queues: a page each, with [`SLOTS`] slots of eight words.
pub const PORTALS: u64 = 0x10_0000;
/// Bytes of a portal.
pub const PORTAL_BYTES: u64 = 4096;
/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 64;
/// Local memory: page tables of 4 KiB.
pub const LOCAL: u64 = 0x100_0000;
/// Bytes of a table.
pub const TABLE_BYTES: u64 = 4096;

/// An entry of the PASID table, or a queue, may be used.
pub const ENABLE: Field = Field::new(0, 1);
/// It was disabled, and accesses for it are still in flight. Read only.
pub const BUSY: Field = Field::new(1, 1);
/// A PASID.
pub const PASID: Field = Field::new(8, 20);

/// Of a page-table entry, and a page request: reading is allowed, or asked for.
pub const READ: Field = Field::new(0, 1);
/// Writing is.
pub const WRITE: Field = Field::new(1, 1);
/// Of a page-table entry: it names a table.
pub const TABLE: Field = Field::new(2, 1);
/// Of a page-table entry of level 1: it is a page of 2 MiB. Without this, [`READ`] and [`WRITE`] it is none.
pub const LEAF: Field = Field::new(3, 1);
/// Of a page-table entry: the first frame, in units of 4 KiB, or the number of the table in local memory. Of an entry of the
/// PASID table: the root.
pub const NUMBER: Field = Field::new(12, 40);

/// The group of a page request.
pub const GROUP: Field = Field::new(32, 16);
/// The answer to a group: [`RETRY`] or [`INVALID`].
pub const RESPONSE: Field = Field::new(0, 4);
/// The page table has what was asked for: look again.
pub const RETRY: u64 = 0;
/// It has not, and will not: the command ends.
pub const INVALID: u64 = 1;

/// What an invalidation covers: [`PAGES`], [`ONE_PASID`] or [`EVERYTHING`].
pub const SCOPE: Field = Field::new(0, 2);
/// Pages of one size, of one PASID.
pub const PAGES: u64 = 0;
/// All of one PASID.
pub const ONE_PASID: u64 = 1;
/// All.
pub const EVERYTHING: u64 = 2;
/// The pages are of 2 MiB, not 4 KiB.
pub const HUGE: Field = Field::new(2, 1);
/// Their number, less one.
pub const COUNT: Field = Field::new(32, 16);

/// Words of a slot: opcode and status, written last.
pub const COMMAND: usize = 0;
/// Where the command reads.
pub const SOURCE: usize = 1;
/// Where it writes, or what it compares with.
pub const DESTINATION: usize = 2;
/// Bytes.
pub const LENGTH: usize = 3;
/// The word to fill with, or to add.
pub const OPERAND: usize = 4;
/// What came of it. Read only.
pub const RESULT: usize = 5;
/// Where it failed. Read only.
pub const FAULT: usize = 6;
/// Bytes that are done. Read only.
pub const DONE_BYTES: usize = 7;

/// The opcode.
pub const OPCODE: Field = Field::new(0, 8);
/// Of [`TOUCH`]: the pages have to be writable.
pub const FOR_WRITE: Field = Field::new(8, 1);
/// The status: written as [`ACTIVE`] to begin.
pub const STATUS: Field = Field::new(32, 8);
/// Why it ended with [`ERROR`].
pub const CAUSE: Field = Field::new(40, 8);

/// Copies bytes.
pub const COPY: u64 = 1;
/// Fills with a word, which begins at the destination.
pub const FILL: u64 = 2;
/// Compares: the offset of the first byte that differs, all ones if none does.
pub const COMPARE: u64 = 3;
/// Adds up the bytes of the source, each times its offset plus one, modulo 2^64.
pub const CHECKSUM: u64 = 4;
/// Adds to the aligned 64-bit word at the destination, atomically: what was there.
pub const ADD: u64 = 5;
/// Faults the pages in and waits for them: no access to memory.
pub const TOUCH: u64 = 6;

/// Nothing to do.
pub const IDLE: u64 = 0;
/// At work.
pub const ACTIVE: u64 = 1;
/// Ended well.
pub const DONE: u64 = 2;
/// Ended with a cause.
pub const ERROR: u64 = 3;

/// No such opcode, no bytes, or an address that no page table translates.
pub const BAD_COMMAND: u64 = 1;
/// The page request was answered with [`INVALID`].
pub const PAGE_FAULT: u64 = 2;
/// The page request was not answered in time.
pub const NO_ANSWER: u64 = 3;
/// The queue, or its PASID, is disabled.
pub const DISABLED: u64 = 4;

/// The first address that no page table translates.
pub const ADDRESSES: u64 = 1 << 48;

/// log2 of what an entry of a table of `level` spans in bytes.
pub const fn span(level: u32) -> u32 {
    12 + 9 * level
}
