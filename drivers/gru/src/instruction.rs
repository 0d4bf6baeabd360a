//! Instructions, as the words of a control block.

use shootdown::Addr;

use crate::layout::{CB_WORDS, status};

/// The size of an instruction's elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Element {
    /// 1 byte.
    Byte = 0,
    /// 2 bytes.
    Short = 1,
    /// 4 bytes.
    Word = 2,
    /// 8 bytes.
    Double = 3,
    /// A cache line of 64 bytes; not for atomics.
    Line = 6,
}

/// What an atomic does. Its result is the value before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Atomic {
    /// Nothing: reads.
    Fetch,
    /// Stores 0.
    Clear,
    /// Adds 1.
    Increment,
    /// Subtracts 1.
    Decrement,
    /// Subtracts 1 unless it is 0.
    DecrementUnlessZero,
    /// Stores the operand.
    Swap(u64),
    /// Sets the operand's bits.
    Or(u64),
    /// Keeps the operand's bits.
    And(u64),
    /// Flips the operand's bits.
    Xor(u64),
    /// Adds the operand.
    Add(u64),
    /// Stores `new` if it finds `expected`.
    CompareSwap {
        /// What is to be found.
        expected: u64,
        /// What is stored then.
        new: u64,
    },
    /// Adds `operand` unless it finds `except`.
    ConditionalAdd {
        /// What is left as it is.
        except: u64,
        /// What is added else.
        operand: u64,
    },
    /// As [`Atomic::CompareSwap`], for the bits of the element that lies in the segment's data at `mask`.
    MaskedCompareSwap {
        /// What those bits are to be.
        expected: u64,
        /// What is stored in them then.
        new: u64,
        /// Byte offset of the mask.
        mask: u16,
    },
    /// Waits, at work, until it finds the operand.
    PollEqual(u64),
    /// Waits, at work, until it finds anything else.
    PollUnequal(u64),
}

/// The kind of memory that an address names. A page of another kind ends the instruction with an exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum AddressKind {
    /// Memory.
    #[default]
    Ram = 0,
    /// Memory-mapped I/O.
    Mmio = 1,
    /// Memory that is not coherent.
    NonCoherent = 2,
    /// Registers.
    Registers = 3,
}

impl Atomic {
    /// Opcode, extended opcode, first and second operand.
    fn encode(self) -> (u64, u64, u64, u64) {
        match self {
            Self::Fetch => (0xa, 1, 0, 0),
            Self::Clear => (0xa, 2, 0, 0),
            Self::Increment => (0xa, 5, 0, 0),
            Self::Decrement => (0xa, 7, 0, 0),
            Self::DecrementUnlessZero => (0xb, 0xf, 0, 0),
            Self::Swap(value) => (0xc, 0, value, 0),
            Self::Or(value) => (0xc, 1, value, 0),
            Self::And(value) => (0xc, 2, value, 0),
            Self::Xor(value) => (0xc, 3, value, 0),
            Self::Add(value) => (0xc, 4, value, 0),
            Self::CompareSwap { expected, new } => (0xc, 8, new, expected),
            Self::ConditionalAdd { except, operand } => (0xc, 0xc, operand, except),
            Self::MaskedCompareSwap { expected, new, .. } => (0x9, 0xb, new, expected),
            Self::PollEqual(value) => (0xd, 9, value, 0),
            Self::PollUnequal(value) => (0xd, 0xa, value, 0),
        }
    }
}

/// One instruction. Addresses are those of the process; offsets are in bytes of the segment's data, counts and strides in
/// elements. What does not fit in its field is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instruction {
    words: [u64; CB_WORDS],
}

impl Instruction {
    fn new(opcode: u64, element: Element, base: Addr, count: u32) -> Self {
        let mut words = [0; CB_WORDS];
        words[0] = 1 | (opcode << 8) | ((element as u64) << 12) | (status::ACTIVE << 16);
        words[1] = base.get();
        words[3] = count.into();
        words[4] = 1;
        Self { words }
    }

    fn offsets(mut self, data: u16, index: u16) -> Self {
        self.words[3] |= (u64::from(data) << 32) | (u64::from(index) << 48);
        self
    }

    /// Memory at `from` to data at `data`.
    pub fn vload(from: Addr, data: u16, element: Element, count: u32) -> Self {
        Self::new(0x2, element, from, count).offsets(data, 0)
    }

    /// Data at `data` to memory at `to`.
    pub fn vstore(data: u16, to: Addr, element: Element, count: u32) -> Self {
        Self::new(0x4, element, to, count).offsets(data, 0)
    }

    /// `value` to each element of memory at `to`.
    pub fn vset(to: Addr, value: u64, element: Element, count: u32) -> Self {
        let mut set = Self::new(0x6, element, to, count);
        set.words[2] = value;
        set
    }

    /// Memory at `from` to memory at `to`, by way of the data at `buffer`.
    pub fn bcopy(from: Addr, to: Addr, buffer: u16, element: Element, count: u32) -> Self {
        let mut copy = Self::new(0x1, element, from, count).offsets(0, buffer);
        copy.words[2] = to.get();
        copy
    }

    /// Elements of memory from `base` on, by the 64-bit indices at `indices`, to data at `data`.
    pub fn gather(base: Addr, indices: u16, data: u16, element: Element, count: u32) -> Self {
        Self::new(0x3, element, base, count).offsets(data, indices)
    }

    /// Data at `data` to elements of memory from `base` on, by the 64-bit indices at `indices`.
    pub fn scatter(data: u16, base: Addr, indices: u16, element: Element, count: u32) -> Self {
        Self::new(0x5, element, base, count).offsets(data, indices)
    }

    /// `value` to elements of memory from `base` on, by the 64-bit indices at `indices`.
    pub fn fill(base: Addr, indices: u16, value: u64, element: Element, count: u32) -> Self {
        let mut fill = Self::new(0x7, element, base, count).offsets(0, indices);
        fill.words[2] = value;
        fill
    }

    /// Whole blocks of data at `data` to memory at `to`.
    pub fn bstore(data: u16, to: Addr, element: Element, count: u32) -> Self {
        Self::new(0xe, element, to, count).offsets(data, 0)
    }

    /// Has memory at `at` written back from caches.
    pub fn vflush(at: Addr, element: Element, count: u32) -> Self {
        Self::new(0xf, element, at, count)
    }

    /// Nothing.
    pub fn nop() -> Self {
        Self::new(0x0, Element::Byte, Addr::new(0), 0)
    }

    /// A message of `lines` cache lines of data at `data` to the queue at `queue`. What became of it says
    /// [`Delivery`](crate::Delivery).
    pub fn message(queue: Addr, data: u16, lines: u32) -> Self {
        Self::new(0x8, Element::Line, queue, lines).offsets(data, 0)
    }

    /// An atomic on memory at `at`.
    pub fn atomic(at: Addr, atomic: Atomic, element: Element) -> Self {
        let (opcode, extended, first, second) = atomic.encode();
        let mut instruction = Self::new(opcode, element, at, 1);
        instruction.words[0] |= extended << 24;
        instruction.words[5] = first;
        instruction.words[6] = second;
        match atomic {
            Atomic::MaskedCompareSwap { mask, .. } => instruction.offsets(mask, 0),
            _ => instruction,
        }
    }

    /// With another distance between elements than 1; negative ones go down.
    pub fn stride(mut self, stride: i64) -> Self {
        self.words[4] = stride as u64;
        self
    }

    /// Interrupts on completion, for [`Segment::wait_asleep`](crate::Segment::wait_asleep).
    pub fn interrupting(mut self) -> Self {
        self.words[0] |= 4 << 4;
        self
    }

    /// Its responses may be held back.
    pub fn delayed(mut self) -> Self {
        self.words[0] |= 1 << 4;
        self
    }

    /// Its addresses are those of memory itself, which only a context of the driver's own may name.
    pub fn unmapped(mut self) -> Self {
        self.words[0] |= 2 << 4;
        self
    }

    /// With other kinds of addresses than memory: of the first, and of the second where there is one.
    pub fn kinds(mut self, first: AddressKind, second: AddressKind) -> Self {
        self.words[0] |= ((first as u64) << 40) | ((second as u64) << 42);
        self
    }

    pub(crate) fn words(&self) -> &[u64; CB_WORDS] {
        &self.words
    }
}
