//! Steps of a program, as bytes spell them.

use arbitrary::{Result, Unstructured};
use shootdown::{PageSize, Rights};

use super::plain::{Instr, Meaning, PAGE, Update};

/// Pages that programs use, in a piece that begins at a multiple of 2 MiB.
pub(super) const PAGES: u64 = 1536;
/// Data bytes of a segment.
pub(super) const DATA: u64 = 1024;

/// A change of a space's pages: first page, and how many.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Map(PageSize, u64, u64, Rights),
    Unmap(u64, u64),
    Discard(u64, u64),
    Protect(u64, u64, Rights),
    Remap(u64, u64, u64),
}

/// Which of the spaces, and which of its segments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who {
    pub(super) space: usize,
    pub(super) segment: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Change(usize, Change),
    /// The CPU writes eight bytes.
    Poke(usize, u64, u64),
    /// Eight bytes of the data segment.
    Data(Who, u64, u64),
    Run(Who, Instr),
    /// Starts an instruction, and changes other pages while it is at work.
    Beside(Who, Instr, Change),
    /// A segment ends, and another one begins.
    Renew(Who),
    /// A space exits, and another one begins.
    Exit(usize),
}

/// Around what other steps use, most of the time.
fn page(bytes: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match bytes.int_in_range(0..=7_u8)? {
        0..=3 => bytes.int_in_range(0..=15)?,
        4 => 496 + bytes.int_in_range(0..=31_u64)?,
        5 => 512 + bytes.int_in_range(0..=15_u64)?,
        6 => PAGES - 1 - bytes.int_in_range(0..=7_u64)?,
        _ => bytes.int_in_range(0..=PAGES - 1)?,
    })
}

fn rights(bytes: &mut Unstructured<'_>) -> Result<Rights> {
    Ok(match bytes.int_in_range(0..=7_u8)? {
        0 => Rights::empty(),
        1 | 2 => Rights::READ,
        3 => Rights::WRITE,
        _ => Rights::READ_WRITE,
    })
}

fn few(bytes: &mut Unstructured<'_>, first: u64) -> Result<u64> {
    let count = match bytes.int_in_range(0..=7_u8)? {
        0 => 512,
        1 => 16,
        few => u64::from(few) - 1,
    };
    Ok(count.min(PAGES - first))
}

fn change(bytes: &mut Unstructured<'_>) -> Result<Change> {
    let first = page(bytes)?;
    let count = few(bytes, first)?;
    Ok(match bytes.int_in_range(0..=7_u8)? {
        0..=2 => {
            let size = *bytes.choose(&PageSize::ALL)?;
            let size = if bytes.ratio(1, 2)? {
                PageSize::FourKiB
            } else {
                size
            };
            let unit = size.bytes() / PAGE;
            let first = first / unit * unit;
            let count = count.next_multiple_of(unit).min(PAGES - first);
            Change::Map(size, first, count, rights(bytes)?)
        }
        3 => Change::Unmap(first, count),
        4 => Change::Discard(first, count),
        5 | 6 => Change::Protect(first, count, rights(bytes)?),
        _ => {
            let to = page(bytes)?;
            Change::Remap(first, to, count.min(PAGES - to))
        }
    })
}

/// An address of the program's pages, at `base`; rarely one of nobody's.
fn address(bytes: &mut Unstructured<'_>, base: u64, size: u64) -> Result<u64> {
    let within = match bytes.int_in_range(0..=3_u8)? {
        0 => 0,
        1 => PAGE - size,
        _ => bytes.int_in_range(0..=PAGE / size - 1)? * size,
    };
    Ok(match bytes.int_in_range(0..=31_u8)? {
        0 => bytes.arbitrary::<u64>()? & !(size - 1),
        1 => base + page(bytes)? * PAGE + within + u64::from(size > 1),
        _ => base + page(bytes)? * PAGE + within,
    })
}

fn instr(bytes: &mut Unstructured<'_>, base: u64) -> Result<Instr> {
    let kind = bytes.int_in_range(0..=9_u8)?;
    let atomic = kind >= 7;
    let size = *bytes.choose(if atomic {
        &[1, 2, 4, 8]
    } else {
        &[1, 2, 4, 8, 64][..]
    })?;
    let room = DATA / size;
    // In the data segment, for `count` elements; now and then not.
    let count = match bytes.int_in_range(0..=15_u8)? {
        _ if atomic => 1,
        0 => 0,
        1 => room + 1,
        2 => 3 * PAGE / size,
        _ => bytes.int_in_range(1..=room.min(64))?,
    };
    let data = match bytes.int_in_range(0..=7_u8)? {
        0 => bytes.int_in_range(0..=DATA)?,
        _ => bytes.int_in_range(0..=room.saturating_sub(count))? * size,
    };
    let indices = 8 * bytes.int_in_range(0..=DATA / 8)?;
    let stride = match bytes.int_in_range(0..=3_u8)? {
        0 => i64::from(bytes.arbitrary::<i8>()?),
        1 => (PAGE / size) as i64,
        _ => 1,
    };
    let at = address(bytes, base, size)?;
    let value = match bytes.ratio(1, 4)? {
        true => bytes.int_in_range(0..=2)?,
        false => bytes.arbitrary()?,
    };
    let meaning = match kind {
        0 => Meaning::Load {
            from: at,
            data,
            stride,
        },
        1 => Meaning::Store {
            data,
            to: at,
            stride,
        },
        2 | 3 => Meaning::Set {
            to: at,
            value,
            stride,
        },
        4 => Meaning::Copy {
            from: at,
            to: address(bytes, base, size)?,
        },
        5 => Meaning::Gather {
            from: at,
            indices,
            data,
        },
        6 => Meaning::Scatter {
            data,
            to: at,
            indices,
        },
        _ => {
            let what = match bytes.int_in_range(0..=10_u8)? {
                0 => Update::Fetch,
                1 => Update::Clear,
                2 => Update::Increment,
                3 => Update::Decrement,
                4 => Update::DecrementUnlessZero,
                5 => Update::Swap(value),
                6 => Update::Or(value),
                7 => Update::And(value),
                8 => Update::Xor(value),
                9 => Update::Add(value),
                _ => Update::CompareSwap {
                    expected: bytes.int_in_range(0..=2)?,
                    new: value,
                },
            };
            Meaning::Atomic { at, what }
        }
    };
    Ok(Instr {
        meaning,
        size,
        count,
    })
}

/// The next step, for a space whose pages begin at `base`.
pub(super) fn step(bytes: &mut Unstructured<'_>, bases: [u64; 2]) -> Result<Step> {
    let who = bytes.int_in_range(0..=7_u8)?;
    let who = Who {
        space: usize::from(who == 0),
        segment: usize::from(who & 1),
    };
    let (space, base) = (who.space, bases[who.space]);
    Ok(match bytes.int_in_range(0..=31_u8)? {
        0..=8 => Step::Change(space, change(bytes)?),
        9..=11 => Step::Poke(
            space,
            page(bytes)? * PAGE + 8 * bytes.int_in_range(0..=511)?,
            bytes.arbitrary()?,
        ),
        12..=14 => {
            let value = match bytes.ratio(1, 2)? {
                true => bytes.int_in_range(0..=4096)?,
                false => bytes.arbitrary()?,
            };
            Step::Data(who, 8 * bytes.int_in_range(0..=DATA / 8 - 1)?, value)
        }
        15..=24 => Step::Run(who, instr(bytes, base)?),
        25..=29 => Step::Beside(who, instr(bytes, base)?, change(bytes)?),
        30 => Step::Renew(who),
        _ => Step::Exit(space),
    })
}
