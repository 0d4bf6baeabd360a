//! The program, run by an interpreter of the instructions that it uses, against plain arithmetic.

use proptest::prelude::*;

use super::*;

/// `struct seccomp_data`.
#[derive(Clone, Copy, Debug)]
struct Data {
    nr: u32,
    arch: u32,
    ip: u64,
    args: [u64; 6],
}

impl Data {
    fn word(&self, at: u32) -> u32 {
        match at {
            NR => self.nr,
            ARCH => self.arch,
            IP => self.ip as u32,
            at if at == IP + 4 => (self.ip >> 32) as u32,
            at => {
                let arg = self.args[(at - ARGS) as usize / 8];
                (arg >> (8 * (at % 8))) as u32
            }
        }
    }
}

fn run(program: &[Insn], data: &Data) -> u32 {
    let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0);
    loop {
        let one = &program[at];
        at += 1;
        let mut jump = |yes| at += usize::from(if yes { one.jt } else { one.jf });
        match one.code {
            LOAD => a = data.word(one.k),
            LOAD_MEM => a = memory[one.k as usize],
            STORE => memory[one.k as usize] = a,
            TO_X => x = a,
            ADD_X => a = a.wrapping_add(x),
            ADD => a = a.wrapping_add(one.k),
            JUMP => at += one.k as usize,
            IF_EQ => jump(a == one.k),
            IF_GT => jump(a > one.k),
            IF_GE => jump(a >= one.k),
            IF_GE_X => jump(a >= x),
            IF_SET => jump(a & one.k != 0),
            RETURN => return one.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

const GATE: u64 = 0x5555_5555_1234;

fn program(ranges: &[Range]) -> Vec<Insn> {
    let watch = Watch {
        gate: GATE,
        ranges,
        heap: true,
    };
    watch.program()
}

fn call(nr: libc::c_long, args: [u64; 6]) -> Data {
    Data {
        nr: nr as u32,
        arch: AUDIT_ARCH_X86_64,
        ip: 0x7fff_0000_1000,
        args,
    }
}

/// What a filter that watches some ranges says of calls.
pub(in super::super) struct Filter(Vec<Insn>);

impl Filter {
    pub(in super::super) fn watching(ranges: &[Range]) -> Self {
        Self(program(ranges))
    }

    pub(in super::super) fn lets_through(&self, nr: libc::c_long, args: [usize; 6]) -> bool {
        run(&self.0, &call(nr, args.map(|arg| arg as u64))) == ALLOW
    }
}

/// Addresses near the ends of what is watched, and near the edges of 32 and 64 bits.
fn address() -> impl Strategy<Value = u64> {
    let edges = [
        0,
        0xffff_f000,
        1 << 32,
        0x7fff_0000_0000,
        0x7fff_ffff_f000,
        0x8000_0000_0000,
        u64::MAX - 0xfff,
    ];
    (proptest::sample::select(edges.to_vec()), -0x3000i64..0x3000)
        .prop_map(|(edge, off)| edge.wrapping_add_signed(off))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn what_is_watched_is_handed_over_and_nothing_else(
        starts in proptest::collection::vec((address(), 1u64..4), 1..=2),
        (at, len) in (address(), prop_oneof![address(), 0u64..0x5000]),
    ) {
        let ranges: Vec<Range> = starts
            .iter()
            .filter_map(|(start, pages)| Range::new(start & !0xfff, pages * 0x1000).ok())
            .collect();
        let overlaps = |range: &Range| {
            let end = u128::from(at) + u128::from(len);
            end >= 1 << 64
                || u128::from(range.start().get()) < end && at <= range.last().get()
        };
        let expected = if ranges.iter().any(overlaps) || at.checked_add(len).is_none() {
            NOTIFY
        } else {
            ALLOW
        };
        let program = program(&ranges);
        for nr in [libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_pkey_mprotect] {
            prop_assert_eq!(run(&program, &call(nr, [at, len, 0, 0, 0, 0])), expected);
        }
        // Rounded up to huge pages the range may reach further.
        let rounded = |size: u64| match at.is_multiple_of(size) {
            true => len.checked_next_multiple_of(size).unwrap_or(len),
            false => len,
        };
        let reaches = |len: u64| {
            let end = u128::from(at) + u128::from(len);
            let meets = |range: &Range| {
                u128::from(range.start().get()) < end && at <= range.last().get()
            };
            end >= 1 << 64 || ranges.iter().any(meets)
        };
        let huge = reaches(rounded(2 << 20)) || reaches(rounded(1 << 30));
        let fixed = [at, len, 3, libc::MAP_FIXED as u64, 0, 0];
        let said = run(&program, &call(libc::SYS_mmap, fixed));
        prop_assert!(said == NOTIFY || !huge);
        if !at.is_multiple_of(2 << 20) {
            prop_assert_eq!(said, expected);
        }
        prop_assert_eq!(run(&program, &call(libc::SYS_mmap, [at, len, 3, 2, 0, 0])), ALLOW);
        let advice = [at, len, libc::MADV_DONTNEED as u64, 0, 0, 0];
        prop_assert_eq!(run(&program, &call(libc::SYS_madvise, advice)), expected);
        let harmless = [at, len, libc::MADV_WILLNEED as u64, 0, 0, 0];
        prop_assert_eq!(run(&program, &call(libc::SYS_madvise, harmless)), ALLOW);
        // The target of a move counts as well.
        let moved = call(libc::SYS_mremap, [0x1000_0000, 0x1000, len, 3, at, 0]);
        prop_assert_eq!(run(&program, &moved), said);
        let bound = |flags| call(libc::SYS_mbind, [at, len, 0, 0, 0, flags]);
        prop_assert_eq!(run(&program, &bound(2)), said);
        prop_assert_eq!(run(&program, &bound(1)), ALLOW);
        // Down to the start of a stack.
        let grows = [at, len, libc::PROT_GROWSDOWN as u64, 0, 0, 0];
        prop_assert_eq!(run(&program, &call(libc::SYS_mprotect, grows)), NOTIFY);
        // What comes through the gate is let through, whatever it is.
        let own = Data { ip: GATE, ..call(libc::SYS_munmap, [at, len, 0, 0, 0, 0]) };
        prop_assert_eq!(run(&program, &own), ALLOW);
    }
}

#[test]
fn other_calls_are_let_through_and_foreign_ones_refused() {
    let range = Range::new(0x7000_0000_0000, 0x1000).unwrap();
    let program = program(&[range]);
    for nr in (0..500).filter(|nr| {
        !matches!(
            *nr,
            9..=12 | 25 | 28 | 30 | 67 | 76 | 77 | 216 | 256 | 285 | 329 | 440
        )
    }) {
        let data = call(nr, [range.start().get(), 0x1000, 0, 0, 0, 0]);
        assert_eq!(run(&program, &data), ALLOW, "call {nr}");
    }
    let asks = call(libc::SYS_move_pages, [0, 1, 0x1000, 0, 0x2000, 2]);
    assert_eq!(run(&program, &asks), ALLOW);
    for nodes in [1, 1 << 40] {
        let moves = call(libc::SYS_move_pages, [0, 1, 0x1000, nodes, 0x2000, 2]);
        assert_eq!(run(&program, &moves), NOTIFY);
    }
    for (request, expected) in [
        (UFFDIO_MOVE as u32, NOTIFY),
        (UFFDIO_WRITEPROTECT as u32, NOTIFY),
        (libc::TIOCGWINSZ as u32, ALLOW),
    ] {
        let asked = call(libc::SYS_ioctl, [3, request.into(), 0, 0, 0, 0]);
        assert_eq!(run(&program, &asked), expected);
    }
    for mode in [0x02, 0x08, 0x10, 0x20, 0x80] {
        let asked = call(libc::SYS_fallocate, [3, mode, 0, 0x1000, 0, 0]);
        assert_eq!(run(&program, &asked), NOTIFY);
    }
    let native = call(libc::SYS_getpid, [0; 6]);
    let i386 = Data {
        arch: 0x4000_0003,
        ..native
    };
    assert_eq!(run(&program, &i386), REFUSE);
    let x32 = Data {
        nr: X32 | native.nr,
        ..native
    };
    assert_eq!(run(&program, &x32), REFUSE);
}

#[test]
fn as_many_ranges_as_there_may_be_fit_its_jumps() {
    let ranges: Vec<Range> = (1..=RANGES as u64)
        .map(|nth| Range::new(nth << 40, 0x1000).unwrap())
        .collect();
    let program = program(&ranges);
    let at = |at: u64| run(&program, &call(libc::SYS_mremap, [at, 0x1000, 0, 0, 0, 0]));
    assert!(ranges.iter().all(|range| at(range.start().get()) == NOTIFY));
    assert_eq!(at(1 << 50), ALLOW);
}
