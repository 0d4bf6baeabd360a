//! The filter: which calls are handed to the supervisor.
//!
//! A classic BPF program over `struct seccomp_data`: 32-bit words, no loops, conditional jumps of at most 255 instructions. Calls that carry
//! their range in registers are compared with the watched ranges as 64-bit numbers, in halves, the sum of address and length with its
//! carry; a sum that wraps is handed over, as is everything that is not sure to lie elsewhere. A watched range is whole pages,
//! so a length that is not makes no difference, unless the pages may be huge. All other calls are let through by their number alone: the kernel finds that out
//! when the filter is installed, and does not run it for them.

use super::super::uffd::sys::{UFFDIO_MOVE, UFFDIO_WRITEPROTECT};
use super::maps::{GIB, HUGE};
use crate::addr::Range;

/// `struct sock_filter`.
pub(super) type Insn = libc::sock_filter;

/// Watched ranges at most: what is asked for, and the scratch area.
pub(super) const RANGES: usize = 8;

// Offsets in `struct seccomp_data`; little-endian.
const NR: u32 = 0;
const ARCH: u32 = 4;
const IP: u32 = 8;
const ARGS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Set in the number of every x32 call.
const X32: u32 = 0x4000_0000;

const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const LOAD_MEM: u16 = (libc::BPF_LD | libc::BPF_MEM) as u16;
const STORE: u16 = libc::BPF_ST as u16;
const TO_X: u16 = (libc::BPF_MISC | libc::BPF_TAX) as u16;
const ADD_X: u16 = (libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X) as u16;
const ADD: u16 = (libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_GT: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const IF_GE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_GE_X: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_X) as u16;
const IF_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// A place in the program.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Label(usize);

enum Line {
    Plain(u16, u32),
    /// Both ways of a conditional jump; `None` goes on.
    Branch(u16, u32, Option<Label>, Option<Label>),
    Goto(Label),
    Here(Label),
}

#[derive(Default)]
struct Assembler {
    lines: Vec<Line>,
    labels: usize,
}

impl Assembler {
    fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels - 1)
    }

    fn here(&mut self, label: Label) {
        self.lines.push(Line::Here(label));
    }

    fn plain(&mut self, code: u16, k: u32) {
        self.lines.push(Line::Plain(code, k));
    }

    fn branch(&mut self, code: u16, k: u32, yes: Option<Label>, no: Option<Label>) {
        self.lines.push(Line::Branch(code, k, yes, no));
    }

    fn goto(&mut self, label: Label) {
        self.lines.push(Line::Goto(label));
    }

    fn assemble(self) -> Vec<Insn> {
        let mut places = vec![0; self.labels];
        let mut at = 0usize;
        for line in &self.lines {
            match line {
                Line::Here(label) => places[label.0] = at,
                _ => at += 1,
            }
        }
        let mut program: Vec<Insn> = Vec::with_capacity(at);
        for line in &self.lines {
            let next = program.len() + 1;
            let distance = |label: &Label| places[label.0] - next;
            let short = |label: &Option<Label>| {
                let distance = label.as_ref().map_or(0, distance);
                u8::try_from(distance).expect("blocks are short")
            };
            program.push(match line {
                Line::Here(_) => continue,
                Line::Plain(code, k) => insn(*code, *k, 0, 0),
                Line::Branch(code, k, yes, no) => insn(*code, *k, short(yes), short(no)),
                Line::Goto(label) => insn(JUMP, distance(label) as u32, 0, 0),
            });
        }
        program
    }
}

fn insn(code: u16, k: u32, jt: u8, jf: u8) -> Insn {
    Insn { code, jt, jf, k }
}

fn halves(value: u64) -> (u32, u32) {
    ((value >> 32) as u32, value as u32)
}

/// The words of an argument: high, low.
fn arg(nth: u32) -> (u32, u32) {
    (ARGS + 8 * nth + 4, ARGS + 8 * nth)
}

/// What a call is handed over for.
#[derive(Clone, Copy)]
enum When {
    /// The range in the arguments of these numbers (address, length) overlaps.
    Range(u32, u32),
    /// It does, or would if the kernel rounded the length up to a huge page: to that the address is aligned then.
    HugeRange(u32, u32),
    /// The argument has any of these bits, in its low word.
    Any(u32, u32),
    /// The argument is not zero.
    Given(u32),
    /// The address in this argument does not lie behind all that is watched.
    NotBehind(u32),
    /// It is made at all.
    Always,
}

/// A condition on an argument's low word that comes first: without it the call is let through.
#[derive(Clone, Copy)]
enum First<'a> {
    None,
    Any(u32, u32),
    OneOf(u32, &'a [i32]),
}

/// What the filter looks for.
pub(super) struct Watch<'a> {
    /// Where calls of this crate come from.
    pub(super) gate: u64,
    /// What is watched: at most [`RANGES`].
    pub(super) ranges: &'a [Range],
    /// Whether what is watched is part of the heap.
    pub(super) heap: bool,
}

impl Watch<'_> {
    pub(super) fn program(&self) -> Vec<Insn> {
        let mut asm = Assembler::default();
        let checked = asm.label();
        asm.plain(LOAD, ARCH);
        asm.branch(IF_EQ, AUDIT_ARCH_X86_64, Some(checked), None);
        asm.plain(RETURN, REFUSE);
        asm.here(checked);
        asm.plain(LOAD, NR);
        let native = asm.label();
        asm.branch(IF_GE, X32, None, Some(native));
        asm.plain(RETURN, REFUSE);
        asm.here(native);
        let calls = self.calls();
        let blocks: Vec<Label> = calls.iter().map(|_| asm.label()).collect();
        for ((nr, ..), block) in calls.iter().zip(&blocks) {
            // The way to the block may be long.
            let (hit, on) = (asm.label(), asm.label());
            asm.branch(IF_EQ, *nr as u32, Some(hit), Some(on));
            asm.here(hit);
            asm.goto(*block);
            asm.here(on);
        }
        asm.plain(RETURN, ALLOW);
        for ((_, first, when), block) in calls.iter().zip(blocks) {
            asm.here(block);
            self.block(&mut asm, *first, when);
        }
        asm.assemble()
    }

    fn calls(&self) -> Vec<(libc::c_long, First<'static>, Vec<When>)> {
        let registers = |address, len| vec![When::Range(address, len)];
        // With one of these bits it begins where the mapping does.
        let protect = vec![When::Range(0, 1), When::Any(2, GROWS)];
        let mut calls = vec![
            (libc::SYS_munmap, First::None, registers(0, 1)),
            (libc::SYS_madvise, First::OneOf(2, ADVICE), registers(0, 1)),
            (libc::SYS_mprotect, First::None, protect.clone()),
            (libc::SYS_pkey_mprotect, First::None, protect),
            (libc::SYS_remap_file_pages, First::None, registers(0, 1)),
            (
                libc::SYS_mmap,
                First::Any(3, libc::MAP_FIXED as u32),
                vec![When::HugeRange(0, 1)],
            ),
            (
                libc::SYS_mremap,
                First::None,
                // Old and new place; the latter only counts where it is given, and is harmless where it is not.
                vec![When::HugeRange(0, 1), When::HugeRange(4, 2)],
            ),
            (
                libc::SYS_mbind,
                First::Any(5, MPOL_MF_MOVE),
                vec![When::HugeRange(0, 1)],
            ),
            // Without nodes it only asks.
            (libc::SYS_move_pages, First::None, vec![When::Given(3)]),
            (libc::SYS_migrate_pages, First::None, vec![When::Always]),
            (
                libc::SYS_ioctl,
                First::OneOf(1, &[UFFDIO_MOVE as i32, UFFDIO_WRITEPROTECT as i32]),
                vec![When::Always],
            ),
            (libc::SYS_shmdt, First::None, vec![When::NotBehind(0)]),
            (
                libc::SYS_shmat,
                First::Any(2, SHM_REMAP),
                vec![When::NotBehind(1)],
            ),
            (
                libc::SYS_fallocate,
                First::Any(1, FALLOCATE),
                vec![When::Always],
            ),
            (libc::SYS_ftruncate, First::None, vec![When::Always]),
            (libc::SYS_truncate, First::None, vec![When::Always]),
            (
                libc::SYS_process_madvise,
                First::OneOf(3, ADVICE),
                vec![When::Always],
            ),
        ];
        if self.heap {
            calls.push((libc::SYS_brk, First::None, vec![When::NotBehind(0)]));
        }
        calls
    }

    /// One call's part. Every way through it ends in a return.
    fn block(&self, asm: &mut Assembler, first: First<'_>, when: &[When]) {
        let allow = asm.label();
        // From the gate: this crate's own.
        let (gate_high, gate_low) = halves(self.gate);
        let stranger = asm.label();
        asm.plain(LOAD, IP);
        asm.branch(IF_EQ, gate_low, None, Some(stranger));
        asm.plain(LOAD, IP + 4);
        asm.branch(IF_EQ, gate_high, Some(allow), None);
        asm.here(stranger);
        match first {
            First::None => {}
            First::Any(nth, mask) => {
                let on = asm.label();
                asm.plain(LOAD, arg(nth).1);
                asm.branch(IF_SET, mask, Some(on), Some(allow));
                asm.here(on);
            }
            First::OneOf(nth, values) => {
                let on = asm.label();
                asm.plain(LOAD, arg(nth).1);
                for value in values {
                    asm.branch(IF_EQ, *value as u32, Some(on), None);
                }
                asm.goto(allow);
                asm.here(on);
            }
        }
        // Returns stand near the jumps to them, which are short.
        let body = asm.label();
        asm.goto(body);
        asm.here(allow);
        asm.plain(RETURN, ALLOW);
        asm.here(body);
        for one in when {
            match *one {
                When::Always => asm.plain(RETURN, NOTIFY),
                When::NotBehind(address) => {
                    let last = self.ranges.iter().map(|range| range.last().get()).max();
                    let behind = asm.label();
                    Self::unless_behind(asm, address, last.unwrap_or(0), behind);
                    asm.plain(RETURN, NOTIFY);
                    asm.here(behind);
                }
                When::Range(address, len) => Self::overlap(asm, address, len, self.ranges),
                When::HugeRange(address, len) => {
                    Self::overlap(asm, address, len, self.ranges);
                    let (on, over) = (asm.label(), asm.label());
                    asm.plain(LOAD, arg(address).1);
                    asm.branch(IF_SET, HUGE as u32 - 1, None, Some(on));
                    asm.goto(over);
                    asm.here(on);
                    // What begins before a border of the largest ends before it.
                    let down = |range: &Range| {
                        let start = range.start().get() & !(GIB as u64 - 1);
                        Range::inclusive(start, range.last()).unwrap_or(*range)
                    };
                    let wider: Vec<Range> = self.ranges.iter().map(down).collect();
                    Self::overlap(asm, address, len, &wider);
                    asm.here(over);
                }
                When::Any(nth, mask) => {
                    let (hit, on) = (asm.label(), asm.label());
                    asm.plain(LOAD, arg(nth).1);
                    asm.branch(IF_SET, mask, Some(hit), Some(on));
                    asm.here(hit);
                    asm.plain(RETURN, NOTIFY);
                    asm.here(on);
                }
                When::Given(nth) => {
                    let (hit, on) = (asm.label(), asm.label());
                    asm.plain(LOAD, arg(nth).0);
                    asm.branch(IF_EQ, 0, None, Some(hit));
                    asm.plain(LOAD, arg(nth).1);
                    asm.branch(IF_EQ, 0, Some(on), None);
                    asm.here(hit);
                    asm.plain(RETURN, NOTIFY);
                    asm.here(on);
                }
            }
        }
        asm.plain(RETURN, ALLOW);
    }

    /// Goes to `behind` if the argument lies behind `last`, else on.
    fn unless_behind(asm: &mut Assembler, address: u32, last: u64, behind: Label) {
        let (high, low) = halves(last);
        let on = asm.label();
        asm.plain(LOAD, arg(address).0);
        asm.branch(IF_GT, high, Some(behind), None);
        asm.branch(IF_EQ, high, None, Some(on));
        asm.plain(LOAD, arg(address).1);
        asm.branch(IF_GT, low, Some(behind), None);
        asm.here(on);
    }

    /// Hands the call over if the range overlaps one that is watched, or wraps; else goes on.
    fn overlap(asm: &mut Assembler, address: u32, len: u32, ranges: &[Range]) {
        /// Words of the end: low, high.
        const LOW: u32 = 0;
        const HIGH: u32 = 1;
        let (carried, plain, summed) = (asm.label(), asm.label(), asm.label());
        let (notify, over) = (asm.label(), asm.label());
        asm.plain(LOAD, arg(address).1);
        asm.plain(TO_X, 0);
        asm.plain(LOAD, arg(len).1);
        asm.plain(ADD_X, 0);
        asm.plain(STORE, LOW);
        asm.branch(IF_GE_X, 0, Some(plain), Some(carried));
        for (label, carry) in [(carried, 1), (plain, 0)] {
            asm.here(label);
            asm.plain(LOAD, arg(address).0);
            asm.plain(TO_X, 0);
            asm.plain(LOAD, arg(len).0);
            asm.plain(ADD_X, 0);
            // Below one of its parts: it has wrapped.
            asm.branch(IF_GE_X, 0, None, Some(notify));
            if carry == 1 {
                asm.plain(ADD, 1);
                asm.branch(IF_EQ, 0, Some(notify), None);
                asm.goto(summed);
            }
        }
        asm.here(summed);
        asm.plain(STORE, HIGH);
        for range in ranges {
            let next = asm.label();
            let (high, low) = halves(range.start().get());
            let ends_inside = asm.label();
            // Ends at or before the first address: elsewhere.
            asm.plain(LOAD_MEM, HIGH);
            asm.branch(IF_GT, high, Some(ends_inside), None);
            asm.branch(IF_EQ, high, None, Some(next));
            asm.plain(LOAD_MEM, LOW);
            asm.branch(IF_GT, low, None, Some(next));
            asm.here(ends_inside);
            Self::unless_behind(asm, address, range.last().get(), next);
            asm.goto(notify);
            asm.here(next);
        }
        asm.goto(over);
        asm.here(notify);
        asm.plain(RETURN, NOTIFY);
        asm.here(over);
    }
}

const SHM_REMAP: u32 = 0o40000;

/// MPOL_MF_MOVE, MPOL_MF_MOVE_ALL.
const MPOL_MF_MOVE: u32 = 0x02 | 0x04;

/// PROT_GROWSDOWN, PROT_GROWSUP.
pub(super) const GROWS: u32 = 0x0300_0000;

/// Modes of `fallocate` that change what is there: punch, collapse, zero, insert, write zeroes.
pub(super) const FALLOCATE: u32 = 0x02 | 0x08 | 0x10 | 0x20 | 0x80;

/// Advice that changes pages: DONTNEED, FREE, REMOVE, UNMERGEABLE, PAGEOUT, DONTNEED_LOCKED, COLLAPSE, HWPOISON, SOFT_OFFLINE,
/// GUARD_INSTALL.
pub(super) const ADVICE: &[i32] = &[4, 8, 9, 13, 21, 24, 25, 100, 101, 102];

#[cfg(test)]
pub(super) mod tests;
