//! A callback that does not return is named, with its thread, and nothing else waits for it.

mod support;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, CutOffFailed, Deadlines, Map, Notifier, Op, ProcessMemory, Range};

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

/// Stays in `cut_off`, or in `release`, until it is told to go on.
#[derive(Default)]
struct Blocks {
    in_release: bool,
    go_on: AtomicBool,
}

impl Blocks {
    fn block(&self) {
        while !self.go_on.load(SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Notifier for Blocks {
    fn cut_off(&self, _: &Op<'_>) -> Result<(), CutOffFailed> {
        if !self.in_release {
            self.block();
        }
        Ok(())
    }
    fn release(&self) {
        if self.in_release {
            self.block();
        }
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
    let blocks = Arc::new(Blocks::default());
    let registration = space.register(page(0), blocks.clone(), &[]).unwrap();
    space.unmap(page(1)).unwrap();
    thread::sleep(4 * AFTER);
    assert_eq!(
        (space.stats().overdue, text().as_str()),
        (0, ""),
        "nothing blocks"
    );

    let unmapping = {
        let space = space.clone();
        named("unmapper", move || space.unmap(page(0)).unwrap())
    };
    wait_for("it is named", || space.stats().overdue == 1);
    thread::sleep(4 * AFTER);
    assert_eq!(space.stats().overdue, 1, "once");
    let said = text();
    for part in [
        "ERROR",
        "watchdog::Blocks",
        "cut_off",
        "unmapper",
        "does not return",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let other = space.map(Map::anonymous(1 << 12)).unwrap();
    space.unmap(other).unwrap();
    blocks.go_on.store(true, SeqCst);
    unmapping.join().unwrap();
    registration.unregister().unwrap();

    let blocks = Arc::new(Blocks {
        in_release: true,
        ..Blocks::default()
    });
    let registration = space.register(page(0), blocks.clone(), &[]).unwrap();
    let releasing = named("releaser", move || drop(registration));
    wait_for("the release is named", || space.stats().overdue == 2);
    let said = text();
    assert!(
        said.contains("\"release\"") && said.contains("releaser"),
        "{said}"
    );
    blocks.go_on.store(true, SeqCst);
    releasing.join().unwrap();
    space.exit().unwrap();
}
