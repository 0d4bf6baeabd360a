//! Whether threads whose operations have nothing to do with each other meet in a line of the cache: one that one of them writes to, and
//! another touches. Of two processors that costs what it costs; of sixteen it is most of the time. `tests/bench/counts` runs this under
//! valgrind, which says what is read and written where; so it takes no processors at all to see.
//!
//! Exit status: 0 no line is shared, 1 one is, 2 wrong usage, 3 the trace is not one of this program's.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::process::ExitCode;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU64, AtomicUsize, compiler_fence};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use clap::Parser;
use shootdown::{AddressSpace, Deadlines, NotifierLock, Range};
use shootdown_bench::case::shoot;
use shootdown_bench::ground::{Empty, Tlb};

/// Does disjoint operations on threads, one after the other, or judges what valgrind has seen of it.
#[derive(Debug, Parser)]
#[command(name = "sharing", version)]
struct Options {
    /// Reads the trace (`valgrind --tool=lackey --trace-mem=yes`) from standard input.
    #[arg(long)]
    judge: bool,
}

const THREADS: usize = 16;
const TIMES: usize = 16;
/// Of x86.
const LINE: u64 = 64;
const CASES: [&str; 5] = [
    "no hit",
    "one hit",
    "a hit with a device",
    "a fault",
    // Then the slot of the hit remembers it.
    "a fault, then a hit",
];

/// Where a store says in the trace what follows: a page at an address that both know, of which each case and thread have a word to
/// begin by, and the last one ends what was begun.
const MARKS: u64 = 0x1_0000_0000;
const END: usize = CASES.len() * THREADS;

struct Marks(&'static [AtomicU64; END + 1]);

impl Marks {
    fn new() -> std::io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping where nothing is.
        let page = unsafe { libc::mmap(MARKS as *mut _, 4096, rights, flags, -1, 0) };
        if page as u64 != MARKS {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: mapped just now for good, zeroes, and nobody else's.
        Ok(Self(unsafe { &*page.cast() }))
    }

    /// One store: an exchange would be seen as a load as well.
    fn mark(&self, nth: usize) {
        compiler_fence(SeqCst);
        self.0[nth].store(1, Relaxed);
        compiler_fence(SeqCst);
    }
}

/// What a thread of a case does, nothing of which is another's.
#[repr(align(128))]
struct Own<F>(F);

/// Each thread does it a few times, and as often while it is looked at, as some of what is written goes round; all of them live until the
/// last is done.
fn on_threads<F: Fn() + Send>(marks: &Marks, case: usize, operations: Vec<Own<F>>) {
    let turn = AtomicUsize::new(0);
    let all = Barrier::new(operations.len());
    std::thread::scope(|scope| {
        for (nth, once) in operations.into_iter().enumerate() {
            let (turn, all) = (&turn, &all);
            scope.spawn(move || {
                while turn.load(SeqCst) != nth {
                    std::thread::sleep(Duration::from_millis(1));
                }
                (0..TIMES).for_each(|_| once.0());
                marks.mark(case * THREADS + nth);
                (0..TIMES).for_each(|_| once.0());
                marks.mark(END);
                turn.fetch_add(1, SeqCst);
                all.wait();
            });
        }
    });
}

/// Disjoint ranges.
fn range(nth: usize) -> Range {
    Range::new((nth as u64 + 1) << 32, 1 << 20).expect("a range")
}

fn operate() -> std::io::Result<()> {
    let marks = Marks::new()?;
    for (case, name) in CASES.into_iter().enumerate() {
        let space = AddressSpace::without_memory(Deadlines::default());
        let register = |nth: usize| {
            let target = (case == 2).then(|| Tlb::target(Duration::ZERO));
            let registration = space.register(range(nth), Arc::new(Empty), target.as_slice());
            Arc::new(registration.expect("a registration"))
        };
        let registrations: Vec<_> = (0..THREADS).map(register).collect();
        let operation = |nth: usize| {
            let (space, registration) = (space.clone(), registrations[nth].clone());
            let hit = if case == 0 { nth + THREADS } else { nth };
            let lock = Own(NotifierLock::new(()));
            Own(move || {
                if case >= 3 {
                    let begun = registration.begin(registration.range(), Duration::from_secs(1));
                    let held = lock.0.lock();
                    assert!(!begun.expect("undisturbed").retry(&held));
                }
                if case != 3 {
                    shoot(&space, range(hit));
                }
            })
        };
        on_threads(&marks, case, (0..THREADS).map(operation).collect());
        println!("{name}: by {THREADS} threads");
    }
    Ok(())
}

/// Who has touched a line, and who has written to it.
#[derive(Default)]
struct Touched {
    by: BTreeSet<usize>,
    written: BTreeSet<usize>,
}

/// Whether no line is shared; what is wrong with the trace, if it is none.
fn judge(trace: impl BufRead) -> Result<bool, String> {
    let mut lines: [BTreeMap<u64, Touched>; CASES.len()] = Default::default();
    let (mut begun, mut marks) = (None, 0);
    for text in trace.split(b'\n') {
        let text = text.map_err(|error| error.to_string())?;
        // ` L address,bytes`, ` S`, ` M`; of instructions the letter is the first.
        let access = text.strip_prefix(b" ").and_then(|text| {
            let text = std::str::from_utf8(text).ok()?;
            let (what, place) = text.split_once(' ')?;
            let (at, bytes) = place.trim().split_once(',')?;
            let at = u64::from_str_radix(at, 16).ok()?;
            Some((what, at, bytes.parse::<u64>().ok()?))
        });
        let Some((what, at, bytes)) = access else {
            continue;
        };
        if let Some(mark) = at.checked_sub(MARKS).filter(|mark| *mark < 4096) {
            let nth = mark as usize / 8;
            begun = (nth < END).then_some((nth / THREADS, nth % THREADS));
            marks += usize::from(begun.is_some());
        } else if let Some((case, thread)) = begun {
            for line in at / LINE..=(at + bytes.max(1) - 1) / LINE {
                let touched = lines[case].entry(line).or_default();
                touched.by.insert(thread);
                if what != "L" {
                    touched.written.insert(thread);
                }
            }
        }
    }
    if marks != END {
        return Err(format!("{marks} operations are marked in it, of {END}"));
    }
    let mut good = true;
    for (name, lines) in CASES.into_iter().zip(&lines) {
        let written = |touched: &&Touched| !touched.written.is_empty();
        let all = lines.values().filter(written).count();
        println!("{name}: {THREADS} threads write to {all} lines");
        for (line, touched) in lines {
            if !touched.written.is_empty() && touched.by.len() > 1 {
                let (at, Touched { by, written }) = (line * LINE, touched);
                println!("  SHARED: {at:#x}, written by {written:?}, touched by {by:?}");
                good = false;
            }
        }
    }
    Ok(good)
}

fn main() -> ExitCode {
    let result = if Options::parse().judge {
        judge(std::io::stdin().lock())
    } else {
        let done = operate().map(|()| true);
        done.map_err(|error| format!("mmap of a page at {MARKS:#x}: {error}"))
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(3)
        }
    }
}
