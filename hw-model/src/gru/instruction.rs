//! Instructions: what a control block's words say, and what an atomic does to a value.
//!
//! Where the data sheet leaves it open: an index vector holds signed 64-bit element indices; a set of cache lines repeats
//! its 64-bit value; conditional add adds unless the old value equals the second operand; the polls compare with the first
//! operand and stay ACTIVE until it fits; masked compare-swap takes its mask, one element, from the data segment at the
//! first offset. Cache-line elements are for vectors, copies and messages only. A stride that leads out of the 64-bit address
//! space is illegal. An index or a copy that does wraps round, to an address that no context has mapped.

use super::layout::{CB_WORDS, cb, cbe};

/// Why an instruction is not carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Illegal {
    /// The exception's cause.
    pub(super) cause: u64,
    /// What of the instruction is wrong.
    pub(super) detail: u64,
}

impl Illegal {
    fn instruction(detail: u64) -> Self {
        Self {
            cause: cbe::INVALID_INSTRUCTION,
            detail,
        }
    }

    fn plain(cause: u64) -> Self {
        Self { cause, detail: 0 }
    }
}

/// What a vector instruction does with its elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Transfer {
    /// Memory to data segment.
    Load,
    /// Data segment to memory.
    Store,
    /// A value to memory.
    Set,
    /// Translated, not accessed: the model's memory has no caches to flush.
    Flush,
}

/// What an atomic does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Atomic {
    Fetch,
    Clear,
    Increment,
    Decrement,
    DecrementUnlessZero,
    Swap,
    Or,
    And,
    Xor,
    Add,
    CompareSwap,
    ConditionalAdd,
    PollEqual,
    PollUnequal,
    MaskedCompareSwap,
}

/// The operands of an atomic, cut to its width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) first: u64,
    pub(super) second: u64,
    pub(super) mask: u64,
}

impl Atomic {
    /// The atomic with this opcode and extended opcode.
    fn decode(opcode: u64, extended: u64) -> Option<Self> {
        Some(match (opcode, extended) {
            (0x9, 0xb) => Self::MaskedCompareSwap,
            (0xa, 1) => Self::Fetch,
            (0xa, 2) => Self::Clear,
            (0xa, 5) => Self::Increment,
            (0xa, 7) => Self::Decrement,
            (0xb, 0xf) => Self::DecrementUnlessZero,
            (0xc, 0) => Self::Swap,
            (0xc, 1) => Self::Or,
            (0xc, 2) => Self::And,
            (0xc, 3) => Self::Xor,
            (0xc, 4) => Self::Add,
            (0xc, 8) => Self::CompareSwap,
            (0xc, 0xc) => Self::ConditionalAdd,
            (0xd, 9) => Self::PollEqual,
            (0xd, 0xa) => Self::PollUnequal,
            _ => return None,
        })
    }

    /// Whether it can store.
    pub(super) fn writes(self) -> bool {
        !matches!(self, Self::Fetch | Self::PollEqual | Self::PollUnequal)
    }

    /// What is stored in the place of `old`, if anything; bits above the width are ignored.
    pub(super) fn apply(self, old: u64, operands: Operands) -> Option<u64> {
        let Operands {
            first,
            second,
            mask,
        } = operands;
        match self {
            Self::Fetch | Self::PollEqual | Self::PollUnequal => None,
            Self::Clear => Some(0),
            Self::Increment => Some(old.wrapping_add(1)),
            Self::Decrement => Some(old.wrapping_sub(1)),
            Self::DecrementUnlessZero => old.checked_sub(1),
            Self::Swap => Some(first),
            Self::Or => Some(old | first),
            Self::And => Some(old & first),
            Self::Xor => Some(old ^ first),
            Self::Add => Some(old.wrapping_add(first)),
            Self::CompareSwap => (old == second).then_some(first),
            Self::ConditionalAdd => (old != second).then(|| old.wrapping_add(first)),
            Self::MaskedCompareSwap => {
                ((old ^ second) & mask == 0).then_some((old & !mask) | (first & mask))
            }
        }
    }

    /// Whether a poll is over; anything else is, once it has been done.
    pub(super) fn is_over(self, value: u64, operands: Operands) -> bool {
        match self {
            Self::PollEqual => value == operands.first,
            Self::PollUnequal => value != operands.first,
            _ => true,
        }
    }
}

/// The kinds of instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Nop,
    /// Memory to memory.
    Copy,
    Vector {
        transfer: Transfer,
        indexed: bool,
    },
    /// Lines of the data segment into a message queue.
    Message,
    Atomic(Atomic),
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    pub(super) kind: Kind,
    /// Bytes of an element.
    pub(super) size: u64,
    pub(super) base0: u64,
    pub(super) base1: u64,
    /// Elements.
    pub(super) count: u64,
    /// Data-segment offset of the data.
    pub(super) tri0: u64,
    /// Data-segment offset of the index vector.
    pub(super) tri1: u64,
    /// Its addresses name frames.
    pub(super) unmapped: bool,
    /// The kinds of the two addresses.
    pub(super) kinds: [u64; 2],
    /// In elements.
    stride: u64,
    first: u64,
    second: u64,
}

impl Instruction {
    /// The instruction of a control block, if it can be carried out with `dsr_bytes` of data segment, and unmapped addresses where
    /// the context may have them.
    pub(super) fn decode(
        words: &[u64; CB_WORDS],
        dsr_bytes: u64,
        may_be_unmapped: bool,
    ) -> Result<Self, Illegal> {
        let shape = words[cb::SHAPE];
        let unmapped = cb::MODIFIERS.get(words[0]) & cb::UNMAPPED != 0;
        if unmapped && !may_be_unmapped {
            return Err(Illegal::plain(cbe::UNMAPPED_MODE_FORBIDDEN));
        }
        let kind = Self::kind(words[0]).ok_or(Illegal::instruction(cbe::WRONG_OPCODE))?;
        let instruction = Self {
            kind,
            size: match cb::ELEMENT.get(words[0]) {
                code @ 0..=3 => 1 << code,
                6 => 64,
                _ if kind == Kind::Nop => 1,
                _ => return Err(Illegal::instruction(cbe::WRONG_ELEMENT)),
            },
            base0: words[cb::BASE0],
            base1: words[cb::BASE1],
            count: cb::COUNT.get(shape),
            tri0: cb::TRI0.get(shape),
            tri1: cb::TRI1.get(shape),
            unmapped,
            kinds: [cb::KIND0, cb::KIND1].map(|field| field.get(words[0])),
            stride: words[cb::STRIDE],
            first: words[cb::OPERAND1],
            second: words[cb::OPERAND2],
        };
        instruction.check(dsr_bytes)?;
        Ok(instruction)
    }

    fn kind(dw0: u64) -> Option<Kind> {
        let vector = |transfer, indexed| Some(Kind::Vector { transfer, indexed });
        match cb::OPCODE.get(dw0) {
            0x0 => Some(Kind::Nop),
            0x1 => Some(Kind::Copy),
            0x2 => vector(Transfer::Load, false),
            0x3 => vector(Transfer::Load, true),
            // A block store is a store of whole blocks.
            0x4 | 0xe => vector(Transfer::Store, false),
            0x5 => vector(Transfer::Store, true),
            0x6 => vector(Transfer::Set, false),
            0x7 => vector(Transfer::Set, true),
            0x8 => Some(Kind::Message),
            0xf => vector(Transfer::Flush, false),
            opcode => Atomic::decode(opcode, cb::EXTENDED.get(dw0)).map(Kind::Atomic),
        }
    }

    fn check(&self, dsr_bytes: u64) -> Result<(), Illegal> {
        let line = self.size == 64;
        let bytes = self.count * self.size;
        // The data-segment bytes at `tri0`, the other address, the index vector.
        let (data, other, indexed) = match self.kind {
            Kind::Nop => return Ok(()),
            Kind::Atomic(_) if line => return Err(Illegal::instruction(cbe::WRONG_ELEMENT)),
            Kind::Message if !line => return Err(Illegal::instruction(cbe::WRONG_ELEMENT)),
            Kind::Atomic(Atomic::MaskedCompareSwap) => (Some(self.size), 0, false),
            Kind::Atomic(_) => (None, 0, false),
            Kind::Copy => (None, self.base1, false),
            Kind::Message => (Some(bytes), 0, false),
            Kind::Vector { transfer, indexed } => {
                let data = matches!(transfer, Transfer::Load | Transfer::Store).then_some(bytes);
                (data, 0, indexed)
            }
        };
        if self.count == 0 && !matches!(self.kind, Kind::Atomic(_)) {
            return Err(Illegal::instruction(cbe::WRONG_COUNT));
        }
        let offset = if data.is_some() { self.tri0 } else { 0 };
        let index = if indexed { self.tri1 } else { 0 };
        let addresses = self.base0 | other | offset;
        if !addresses.is_multiple_of(self.size) || !index.is_multiple_of(8) {
            return Err(Illegal::instruction(cbe::WRONG_ALIGNMENT));
        }
        if matches!(self.kind, Kind::Vector { indexed: false, .. }) && !self.stays_inside() {
            return Err(Illegal::instruction(cbe::WRONG_STRIDE));
        }
        let index_bytes = if indexed { self.count * 8 } else { 0 };
        if data.is_some_and(|data| offset + data > dsr_bytes) || index + index_bytes > dsr_bytes {
            return Err(Illegal::plain(cbe::DATA_SEGMENT_LIMIT));
        }
        Ok(())
    }

    /// Whether the last element lies in the 64-bit address space, as the first does.
    fn stays_inside(&self) -> bool {
        let steps = i128::from(self.count - 1) * i128::from(self.stride as i64);
        let last = i128::from(self.base0) + steps * i128::from(self.size);
        (0..1 << 64).contains(&last)
    }

    /// Whether memory is written at the first address.
    pub(super) fn writes(&self) -> bool {
        match self.kind {
            Kind::Nop | Kind::Copy => false,
            Kind::Vector { transfer, .. } => matches!(transfer, Transfer::Store | Transfer::Set),
            Kind::Message => true,
            Kind::Atomic(atomic) => atomic.writes(),
        }
    }

    /// Whether the elements lie one after the other in memory.
    pub(super) fn is_contiguous(&self) -> bool {
        matches!(self.kind, Kind::Vector { indexed: false, .. }) && self.stride == 1
    }

    /// The address of an element. `index` reads the index vector.
    pub(super) fn address(&self, element: u64, index: impl FnOnce(u64) -> u64) -> u64 {
        let steps = match self.kind {
            Kind::Vector { indexed: true, .. } => index(element),
            Kind::Vector { .. } => element.wrapping_mul(self.stride),
            Kind::Copy => element,
            Kind::Nop | Kind::Message | Kind::Atomic(_) => 0,
        };
        // Two's complement: a negative stride or index wraps to a lower address.
        self.base0.wrapping_add(steps.wrapping_mul(self.size))
    }

    /// Element `element` of a copy's destination.
    pub(super) fn destination(&self, element: u64) -> u64 {
        self.base1.wrapping_add(element.wrapping_mul(self.size))
    }

    /// The operands of an atomic, with the mask that the data segment holds.
    pub(super) fn operands(&self, mask: u64) -> Operands {
        let width = u64::MAX >> (64 - 8 * self.size.min(8));
        Operands {
            first: self.first & width,
            second: self.second & width,
            mask: mask & width,
        }
    }

    /// Fills `into` with the value of a set.
    pub(super) fn fill(&self, into: &mut [u8]) {
        let value = self.base1.to_le_bytes();
        for part in into.chunks_mut(self.size.min(8) as usize) {
            part.copy_from_slice(&value[..part.len()]);
        }
    }
}
