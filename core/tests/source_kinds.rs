//! Kinds of memory by operations: what each source tells of, what the kernel refuses, and what changes pages with nobody told.
//!
//! The table is made by doing it all, and compared with the one beside this file. To write that anew:
//! `SHOOTDOWN_UPDATE_TABLE=1 cargo test -p shootdown --test source_kinds`.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
#[path = "support/kinds.rs"]
mod kinds;
mod support;

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use child::in_child;
use foreign::*;
use kinds::*;
use shootdown::*;
use support::short;

/// What was seen of an operation on a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cell {
    /// Told before, and the change waited.
    Barrier,
    /// Told, but nobody waited.
    Told,
    /// Not told, and there was nothing to tell: the same frame is there, with the same rights.
    Nothing,
    /// Not told, and the page is another, or gone.
    NotSeen,
    /// Not told, of what the kernel does or leaves.
    Whim,
    /// The kernel refuses it.
    Refused(&'static str),
    /// It makes no sense for this kind.
    NoSense,
}

impl Cell {
    fn text(self) -> String {
        match self {
            Self::Barrier => "barrier".to_owned(),
            Self::Told => "told".to_owned(),
            Self::Nothing => "same".to_owned(),
            Self::NotSeen => "**not seen**".to_owned(),
            Self::Whim => "**not seen**, if done".to_owned(),
            Self::Refused(errno) => errno.to_owned(),
            Self::NoSense => String::new(),
        }
    }
}

const TOLD: u8 = 1;
const BARRIER: u8 = 2;

/// Looks on from inside the shootdown.
#[derive(Default)]
struct Observer {
    page: AtomicUsize,
    frame: AtomicU64,
    armed: AtomicBool,
    returned: AtomicBool,
    saw: AtomicU8,
    /// For how long the change is kept waiting.
    nap: Mutex<Duration>,
}

impl Observer {
    fn is_old(&self) -> bool {
        frame(self.page.load(SeqCst)) == self.frame.load(SeqCst) && !self.returned.load(SeqCst)
    }
}

impl Notifier for Observer {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let page = self.page.load(SeqCst) as u64;
        if self.armed.load(SeqCst) && op.range().holds(page.into()) {
            self.saw.fetch_or(TOLD, SeqCst);
            let until = Instant::now() + *self.nap.lock().unwrap();
            while self.is_old() && Instant::now() < until {
                std::thread::sleep(Duration::from_micros(200));
            }
            if self.is_old() {
                self.saw.fetch_or(BARRIER, SeqCst);
            }
        }
        Ok(op.idle())
    }
}

struct Table<'t> {
    space: &'t AddressSpace,
    source: Arc<dyn Source>,
    buffer: Range,
    helper: &'t Helper,
    nap: Duration,
}

impl Table<'_> {
    fn cell(&self, kind: &MemoryKind, operation: &Deed) -> Cell {
        let at = start(self.buffer);
        reset(self.space, self.buffer);
        let mut memory = match kind.map(self.space, self.buffer) {
            Ok(memory) => memory,
            Err(reason) => panic!("{}: {reason}", kind.name),
        };
        if !(operation.makes_sense)(&memory) {
            return Cell::NoSense;
        }
        memory.helper = Some(self.helper);
        let observer = Arc::new(Observer::default());
        *observer.nap.lock().unwrap() = self.nap;
        let range = Range::new(at as u64, memory.len as u64).unwrap();
        let registration = self.space.register(range, observer.clone(), &[]).unwrap();
        let page = at
            + if operation.second_half {
                memory.len / 2
            } else {
                0
            };
        (operation.prepare)(&memory);
        self.source.settle();
        let before = frame(page);
        assert_ne!(before, 0, "{} has a frame", kind.name);
        observer.page.store(page, SeqCst);
        observer.frame.store(before, SeqCst);
        observer.armed.store(true, SeqCst);
        let result = (operation.make)(&memory);
        observer.returned.store(true, SeqCst);
        // What is late is told by then.
        self.source.settle();
        let after = frame(page);
        let saw = observer.saw.load(SeqCst);
        observer.armed.store(false, SeqCst);
        drop(registration);
        (operation.undo)(&memory);
        match result {
            Err(errno) => Cell::Refused(name(errno)),
            Ok(_) if saw & BARRIER != 0 => Cell::Barrier,
            Ok(_) if saw & TOLD != 0 => Cell::Told,
            Ok(_) if operation.whim => Cell::Whim,
            Ok(_) if after == before && !operation.rights => Cell::Nothing,
            Ok(_) => Cell::NotSeen,
        }
    }

    fn rows(&self, kinds: &[&MemoryKind]) -> Vec<Vec<Cell>> {
        let row = |deed| kinds.iter().map(|kind| self.cell(kind, deed)).collect();
        DEEDS.iter().map(row).collect()
    }
}

fn markdown(kinds: &[&MemoryKind], rows: &[Vec<Cell>]) -> String {
    let mut text = String::from("| operation |");
    kinds
        .iter()
        .for_each(|kind| write!(text, " {} |", kind.name).unwrap());
    text += "\n|---|";
    kinds.iter().for_each(|_| text += "---|");
    text.push('\n');
    for (deed, row) in DEEDS.iter().zip(rows) {
        write!(text, "| {} |", deed.name).unwrap();
        row.iter()
            .for_each(|cell| write!(text, " {} |", cell.text()).unwrap());
        text.push('\n');
    }
    text
}

const COMMITTED: &str = include_str!("source_kinds.md");
const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/source_kinds.md");

const HEAD: &str = "\
# Kinds of memory by operations

Made by `core/tests/source_kinds.rs`, which does all of this and compares; as root, without swap, on Linux 6.18. The observer is a handler on the memory, and
the frame of one page of it, as /proc/self/pagemap shows it.

- *barrier*: the handler ran while the old frame was there, and the change waited.
- *told*: the handler ran, but the change did not wait for it.
- *same*: nobody was told, and there was nothing to tell: the frame is the same.
- ***not seen***: nobody was told, and the frame is another, or gone; *if done*: the kernel may also leave it, and the frame is the same then.
- an errno: the kernel refuses it. Empty: it makes no sense there.

\"Managed\" is what a space's own `map` has mapped; all other kinds were put there by foreign calls. Shared files are mapped `MAP_SHARED`.
";

#[test]
fn the_table_of_kinds_and_operations_is_the_committed_one() {
    if !in_child("the_table_of_kinds_and_operations_is_the_committed_one") {
        return;
    }
    if let Some(reason) = is_another_machine() {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    // Before there is a filter: a process that has nothing to do with this one.
    let helper = Helper::start();
    let _huge = HugePages::reserve(4);
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let buffer = space
        .map(Map::anonymous(4 << 20))
        .and_then(|range| {
            // Huge pages fit.
            let aligned = range.start().get().next_multiple_of(2 << 20);
            space.unmap(range)?;
            space.map(Map::anonymous(2 << 20).at(aligned.into()))
        })
        .unwrap();
    let (kinds, skipped): (Vec<&MemoryKind>, Vec<&MemoryKind>) =
        KINDS.iter().partition(|kind| kind.missing().is_none());
    for kind in &skipped {
        eprintln!("SKIPPED: {}: {}", kind.name, kind.missing().unwrap());
    }
    let mut tables = Vec::new();
    let sources: [Arc<dyn Source>; 2] = [Arc::new(Uffd::new()), Arc::new(Unotify::new())];
    for (source, nap) in sources.into_iter().zip([500, 3]) {
        let watched = space.watch(source.clone(), arena).unwrap();
        let table = Table {
            space: &space,
            source,
            buffer,
            helper: &helper,
            nap: Duration::from_millis(nap),
        };
        tables.push(table.rows(&kinds));
        reset(&space, buffer);
        drop(watched);
    }
    let mut text = HEAD.to_owned();
    for (name, rows) in ["uffd", "unotify"].into_iter().zip(&tables) {
        write!(text, "\n## {name}\n{}", markdown(&kinds, rows)).unwrap();
    }
    text += "\n## What no source sees\n";
    for (nth, deed) in DEEDS.iter().enumerate() {
        let unseen = (0..kinds.len()).filter(|kind| {
            let mut cells = tables.iter().map(|rows| rows[nth][*kind]);
            cells.all(|cell| cell == Cell::NotSeen)
        });
        let names: Vec<_> = unseen.map(|kind| kinds[kind].name).collect();
        if !names.is_empty() {
            writeln!(text, "- {}: {}", deed.name, names.join(", ")).unwrap();
        }
    }
    if std::env::var_os("SHOOTDOWN_UPDATE_TABLE").is_some() {
        std::fs::write(PATH, text).unwrap();
    } else if skipped.is_empty() {
        assert!(
            text == COMMITTED,
            "another table than the committed one:\n{text}"
        );
    }
}
