//! What a program means, over plain bytes: pages that are there or not, a data segment, and instructions one element after the other.
//! Shares nothing with the driver or the model but the numbers of the data sheet.

use std::collections::{BTreeMap, BTreeSet};

pub(super) const PAGE: u64 = 4096;

/// A page of 4 KiB.
#[derive(Clone, Debug)]
pub(super) struct Page {
    pub(super) read: bool,
    pub(super) write: bool,
    /// Empty for zeroes.
    pub(super) bytes: Vec<u8>,
}

impl Page {
    pub(super) fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, at: usize, value: u8) {
        self.bytes.resize(PAGE as usize, 0);
        self.bytes[at] = value;
    }
}

/// The pages of a space, by address / 4096.
#[derive(Default)]
pub(super) struct Pages(pub(super) BTreeMap<u64, Page>);

/// How an instruction ends too early: causes, what is said beside them, and where.
pub(super) type Exception = (u64, u64, u64);

const INVALID_INSTRUCTION: u64 = 1 << 1;
const NO_ELEMENTS: u64 = 3;
const NOT_ALIGNED: u64 = 4;
/// The stride leads out of all addresses.
const WRONG_STRIDE: u64 = 5;
const DATA_SEGMENT_LIMIT: u64 = 1 << 5;
const TLB_FATAL: u64 = 1 << 6;
const NOT_MAPPED: u64 = 1;
const NOT_FOR_STORES: u64 = 2;

/// An instruction in words of its own.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meaning {
    Load { from: u64, data: u64, stride: i64 },
    Store { data: u64, to: u64, stride: i64 },
    Set { to: u64, value: u64, stride: i64 },
    Copy { from: u64, to: u64 },
    Gather { from: u64, indices: u64, data: u64 },
    Scatter { data: u64, to: u64, indices: u64 },
    Atomic { at: u64, what: Update },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Update {
    Fetch,
    Clear,
    Increment,
    Decrement,
    DecrementUnlessZero,
    Swap(u64),
    Or(u64),
    And(u64),
    Xor(u64),
    Add(u64),
    CompareSwap { expected: u64, new: u64 },
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Instr {
    pub(super) meaning: Meaning,
    /// Bytes of an element.
    pub(super) size: u64,
    pub(super) count: u64,
}

fn number(bytes: &[u8]) -> u64 {
    let each = bytes.iter().rev();
    each.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn moved(base: u64, steps: i64, size: u64) -> u64 {
    (i128::from(base) + i128::from(steps) * i128::from(size)) as u64
}

/// Memory and data segment of a segment, and which pages were looked at.
pub(super) struct Machine<'m> {
    pub(super) pages: &'m mut Pages,
    pub(super) data: &'m mut Vec<u8>,
    pub(super) touched: BTreeSet<u64>,
}

impl Machine<'_> {
    /// The page for an access, or why there is none.
    fn page(&mut self, at: u64, write: bool) -> Result<&mut Page, Exception> {
        self.touched.insert(at / PAGE);
        match self.pages.0.get_mut(&(at / PAGE)) {
            Some(page) if page.read && (page.write || !write) => Ok(page),
            Some(page) if page.read => Err((TLB_FATAL, NOT_FOR_STORES, at)),
            _ => Err((TLB_FATAL, NOT_MAPPED, at)),
        }
    }

    fn read(&mut self, at: u64, size: u64) -> Result<Vec<u8>, Exception> {
        let page = self.page(at, false)?;
        let within = (at % PAGE) as usize;
        Ok((within..within + size as usize)
            .map(|at| page.byte(at))
            .collect())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Exception> {
        let page = self.page(at, true)?;
        for (nth, byte) in bytes.iter().enumerate() {
            page.set((at % PAGE) as usize + nth, *byte);
        }
        Ok(())
    }

    fn data(&mut self, at: u64, size: u64) -> &mut [u8] {
        &mut self.data[at as usize..(at + size) as usize]
    }

    /// Whether it can be begun at all.
    fn check(&self, instr: &Instr) -> Result<(), Exception> {
        let Instr { size, count, .. } = *instr;
        let (base, aligned, data, indices) = match instr.meaning {
            Meaning::Load { from, data, .. } => (from, vec![from, data], Some(data), None),
            Meaning::Store { data, to, .. } => (to, vec![to, data], Some(data), None),
            Meaning::Set { to, .. } => (to, vec![to], None, None),
            Meaning::Copy { from, to } => (from, vec![from, to], None, None),
            Meaning::Gather {
                from,
                indices,
                data,
            } => (from, vec![from, data], Some(data), Some(indices)),
            Meaning::Scatter { data, to, indices } => {
                (to, vec![to, data], Some(data), Some(indices))
            }
            Meaning::Atomic { at, .. } => (at, vec![at], None, None),
        };
        let len = self.data.len() as u64;
        let outside = |at: Option<u64>, size: u64| at.is_some_and(|at| at + count * size > len);
        if count == 0 {
            return Err((INVALID_INSTRUCTION, NO_ELEMENTS, base));
        }
        let odd = aligned.iter().any(|at| !at.is_multiple_of(size));
        if odd || indices.is_some_and(|at| !at.is_multiple_of(8)) {
            return Err((INVALID_INSTRUCTION, NOT_ALIGNED, base));
        }
        let stride = match instr.meaning {
            Meaning::Load { stride, .. }
            | Meaning::Store { stride, .. }
            | Meaning::Set { stride, .. } => stride,
            _ => 0,
        };
        let last = i128::from(base) + i128::from(count - 1) * i128::from(stride) * i128::from(size);
        if u64::try_from(last).is_err() {
            return Err((INVALID_INSTRUCTION, WRONG_STRIDE, base));
        }
        if outside(data, size) || outside(indices, 8) {
            return Err((DATA_SEGMENT_LIMIT, 0, base));
        }
        Ok(())
    }

    /// Carries an instruction out: what an atomic found. What was done before an exception is done.
    pub(super) fn run(&mut self, instr: &Instr) -> Result<Option<u64>, Exception> {
        self.check(instr)?;
        let size = instr.size;
        for nth in 0..instr.count {
            let own = |data: u64| data + nth * size;
            let step = nth as i64;
            match instr.meaning {
                Meaning::Load { from, data, stride } => {
                    let bytes = self.read(moved(from, step.wrapping_mul(stride), size), size)?;
                    self.data(own(data), size).copy_from_slice(&bytes);
                }
                Meaning::Store { data, to, stride } => {
                    let bytes = self.data(own(data), size).to_vec();
                    self.write(moved(to, step.wrapping_mul(stride), size), &bytes)?;
                }
                Meaning::Set { to, value, stride } => {
                    let bytes = value.to_le_bytes().repeat(8);
                    let bytes = &bytes[..size as usize];
                    self.write(moved(to, step.wrapping_mul(stride), size), bytes)?;
                }
                Meaning::Copy { from, to } => {
                    let bytes = self.read(moved(from, step, size), size)?;
                    self.write(moved(to, step, size), &bytes)?;
                }
                Meaning::Gather {
                    from,
                    indices,
                    data,
                } => {
                    let index = number(self.data(indices + 8 * nth, 8)) as i64;
                    let bytes = self.read(moved(from, index, size), size)?;
                    self.data(own(data), size).copy_from_slice(&bytes);
                }
                Meaning::Scatter { data, to, indices } => {
                    let index = number(self.data(indices + 8 * nth, 8)) as i64;
                    let bytes = self.data(own(data), size).to_vec();
                    self.write(moved(to, index, size), &bytes)?;
                }
                Meaning::Atomic { at, what } => return self.update(at, size, what).map(Some),
            }
        }
        Ok(None)
    }

    fn update(&mut self, at: u64, size: u64, what: Update) -> Result<u64, Exception> {
        let cut = |value: u64| value & (u64::MAX >> (64 - 8 * size));
        let old = match what {
            Update::Fetch => return Ok(number(&self.read(at, size)?)),
            _ => {
                self.page(at, true)?;
                number(&self.read(at, size)?)
            }
        };
        let new = match what {
            Update::Fetch => old,
            Update::Clear => 0,
            Update::Increment => old.wrapping_add(1),
            Update::Decrement => old.wrapping_sub(1),
            Update::DecrementUnlessZero => old.saturating_sub(1),
            Update::Swap(value) => value,
            Update::Or(value) => old | value,
            Update::And(value) => old & value,
            Update::Xor(value) => old ^ value,
            Update::Add(value) => old.wrapping_add(value),
            Update::CompareSwap { expected, new } if cut(expected) == old => new,
            Update::CompareSwap { .. } => old,
        };
        self.write(at, &new.to_le_bytes()[..size as usize])?;
        Ok(old)
    }
}
