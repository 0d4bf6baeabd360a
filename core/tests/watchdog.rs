//! A callback that does not return is named, with its thread, and nothing else waits for it.

mod support;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, CutOffFailed, Deadlines, Drain, Gather, Issued, Map, Notifier, Op, Outcome,
    ProcessMemory, Range, WouldBlock,
};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Stays in one callback until it is told to go on.
struct Blocks {
    at: &'static str,
    polled: bool,
    go_on: AtomicBool,
}

impl Blocks {
    fn new(at: &'static str, polled: bool) -> Arc<Self> {
        Arc::new(Self {
            at,
            polled,
            go_on: AtomicBool::new(false),
        })
    }

    fn block(&self, at: &str) {
        while self.at == at && !self.go_on.load(SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Notifier for Blocks {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.block("quiesce");
        Ok(if self.polled { op.drain() } else { op.idle() })
    }
    fn drained(&self, _: &Op<'_>) -> bool {
        self.block("drained");
        true
    }
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        self.block("flush");
        gather.all()
    }
    fn cut_off(&self, _: &Op<'_>) -> Result<(), CutOffFailed> {
        self.block("cut_off");
        Ok(())
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.block("end");
    }
    fn release(&self) {
        self.block("release");
    }
}

const AFTER: Duration = Duration::from_millis(100);

fn watched() -> AddressSpace {
    let memory = ProcessMemory::reserve(1 << 20).unwrap();
    let deadlines = Deadlines {
        callback: AFTER,
        ..Deadlines::default()
    };
    AddressSpace::managed(Arc::new(memory), deadlines)
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn named(name: &str, run: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.spawn(run).unwrap()
}

/// One test: the log is the process's.
#[test]
fn a_callback_that_blocks_is_named_once_and_stalls_only_what_overlaps() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let text = || String::from_utf8(log.0.lock().unwrap().clone()).unwrap();

    let space = watched();
    let buffer = space.map(Map::anonymous(2 << 12)).unwrap();
    let page = move |nth: u64| Range::new(buffer.start().get() + (nth << 12), 1 << 12).unwrap();
    thread::sleep(4 * AFTER);
    assert_eq!(
        (space.stats().overdue, text().as_str()),
        (0, ""),
        "nothing blocks"
    );

    const CALLBACKS: [&str; 5] = ["quiesce", "drained", "flush", "cut_off", "end"];
    // With nothing in flight the calls follow each other at once.
    let polled = CALLBACKS.map(|at| (at, true));
    let idle = ["quiesce", "flush", "cut_off", "end"].map(|at| (at, false));
    let all = polled.into_iter().chain(idle);
    let mut named_before = 0;
    for (at, polled) in all {
        let blocks = Blocks::new(at, polled);
        let registration = space.register(page(0), blocks.clone(), &[]).unwrap();
        let discarding = {
            let space = space.clone();
            named("discarder", move || space.discard(page(0)).unwrap())
        };
        wait_for("it is named", || space.stats().overdue == named_before + 1);
        thread::sleep(4 * AFTER);
        assert_eq!(space.stats().overdue, named_before + 1, "once");
        let said = text();
        let line = said.lines().last().unwrap();
        for part in [
            "ERROR",
            "watchdog::Blocks",
            &format!("stage=\"{at}\""),
            "discarder",
            "does not return",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        // What does not overlap is done meanwhile, beside it and elsewhere.
        space.discard(page(1)).unwrap();
        let other = space.map(Map::anonymous(1 << 12)).unwrap();
        space.unmap(other).unwrap();
        assert!(!discarding.is_finished(), "it does not overlap: {at}");
        blocks.go_on.store(true, SeqCst);
        discarding.join().unwrap();
        registration.unregister().unwrap();
        named_before += 1;
    }

    let blocks = Blocks::new("release", true);
    let registration = space.register(page(0), blocks.clone(), &[]).unwrap();
    let releasing = named("releaser", move || drop(registration));
    wait_for("the release is named", || {
        space.stats().overdue == named_before + 1
    });
    let said = text();
    assert!(
        said.contains("\"release\"") && said.contains("releaser"),
        "{said}"
    );
    blocks.go_on.store(true, SeqCst);
    releasing.join().unwrap();
    space.exit().unwrap();
}

/// Is in `quiesce` most of the time, and never for long.
struct Brief;

impl Notifier for Brief {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        thread::sleep(AFTER / 50);
        Ok(op.idle())
    }
}

#[test]
fn one_callback_after_the_other_is_not_one_that_does_not_return() {
    let space = watched();
    let page = space.map(Map::anonymous(1 << 12)).unwrap();
    let _registration = space.register(page, Arc::new(Brief), &[]).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < 6 * AFTER {
        space.discard(page).unwrap();
    }
    assert_eq!(space.stats().overdue, 0);
}
