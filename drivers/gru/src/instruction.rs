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

    /// An atomic on memory at `at`.
    pub fn atomic(at: Addr, atomic: Atomic, element: Element) -> Self {
        let (opcode, extended, first, second) = atomic.encode();
        let mut instruction = Self::new(opcode, element, at, 1);
        instruction.words[0] |= extended << 24;
        instruction.words[5] = first;
        instruction.words[6] = second;
        instruction
    }

    /// With another distance between elements than 1; negative ones go down.
    pub fn stride(mut self, stride: i64) -> Self {
        self.words[4] = stride as u64;
        self
    }

    pub(crate) fn words(&self) -> &[u64; CB_WORDS] {
        &self.words
    }
}
