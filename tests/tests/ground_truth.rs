//! Ground truth: a KVM guest reads the same address as a device under the framework, after pages have been discarded, mapped over
//! and moved by raw system calls. The kernel keeps the guest coherent by its own MMU notifier. So where the guest sees new
//! contents and the device old ones, the framework is wrong.
//!
//! The device is real memory, pinned: its one TLB entry is a buffer registered with an io_uring, which holds on to the
//! page as VFIO does, whatever becomes of the mapping.

#[path = "../../core/tests/support/child.rs"]
mod child;
#[path = "../../core/tests/support/foreign.rs"]
mod foreign;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use child::in_child;
use foreign::*;
use io_uring::{IoUring, opcode, types};
use shootdown::*;
use shootdown_kvm::{Guest, KvmError};

const ROUNDS: u64 = 20_000;

/// A device with one TLB entry, which pins the page.
struct Pins {
    ring: IoUring,
    out: File,
    page: Range,
    pinned: bool,
}

impl Pins {
    fn new(page: Range) -> Self {
        // SAFETY: a name, and a number.
        let out = unsafe { libc::memfd_create(c"device".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(out >= 0);
        Self {
            ring: IoUring::new(2).unwrap(),
            // SAFETY: opened just now.
            out: unsafe { File::from_raw_fd(out) },
            page,
            pinned: false,
        }
    }

    /// Walks the kernel's page table, and holds on to what is there.
    fn pin(&mut self) -> bool {
        let buffer = libc::iovec {
            iov_base: start(self.page) as *mut libc::c_void,
            iov_len: self.page.len() as usize,
        };
        // SAFETY: the device reads the page that is there now, for as long as it holds it: that is what is tested.
        self.pinned = unsafe { self.ring.submitter().register_buffers(&[buffer]) }.is_ok();
        self.pinned
    }

    fn unpin(&mut self) {
        if std::mem::take(&mut self.pinned) {
            self.ring.submitter().unregister_buffers().unwrap();
        }
    }

    /// Reads the pinned page.
    fn read(&mut self) -> u64 {
        let out = types::Fd(self.out.as_raw_fd());
        let write = opcode::WriteFixed::new(out, start(self.page) as *const u8, 8, 0).build();
        // SAFETY: the buffer is registered.
        unsafe { self.ring.submission().push(&write) }.unwrap();
        self.ring.submit_and_wait(1).unwrap();
        assert_eq!(self.ring.completion().next().unwrap().result(), 8);
        let mut word = [0; 8];
        self.out.read_exact_at(&mut word, 0).unwrap();
        u64::from_le_bytes(word)
    }
}

/// The device's entry. Whoever waits for it gets it before a thread that is about to take it once more: of many processors that one
/// would else always be the first.
struct Entry {
    pins: Mutex<Pins>,
    waiting: AtomicUsize,
}

impl Entry {
    fn lock(&self) -> MutexGuard<'_, Pins> {
        self.waiting.fetch_add(1, SeqCst);
        let pins = self.pins.lock().unwrap();
        self.waiting.fetch_sub(1, SeqCst);
        pins
    }

    fn let_others_go_first(&self) {
        while self.waiting.load(SeqCst) > 0 {
            thread::yield_now();
        }
    }
}

struct Tlb(Arc<Entry>, Range);

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 512,
            commands_per_batch: 8,
            full_flush_cost: 8,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        let hit = match command.scope {
            Scope::Pages { range, .. } => range.overlaps(self.1),
            _ => true,
        };
        if hit {
            self.0.lock().unpin();
        }
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        Ticket(1)
    }

    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

/// Under whose lock the device takes its entry.
#[derive(Default)]
struct Driver(NotifierLock<()>);

impl Notifier for Driver {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        drop(self.0.lock_for(op)?);
        Ok(op.idle())
    }
}

/// What is wrong on purpose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Nothing watches the space.
    NoSource,
    /// The driver installs an entry without a look at the sequence (R9).
    NoRetry,
}

struct Device<'d> {
    entry: Arc<Entry>,
    driver: Arc<Driver>,
    registration: &'d Registration,
    page: Range,
    wrong: Wrong,
}

impl Device<'_> {
    /// The entry makes room for another.
    fn evict(&self) {
        self.entry.lock().unpin();
    }

    /// What the device reads now; after a fault if it has no entry. The thread's `spare` becomes the entry then, and is read before anybody
    /// else evicts it: else this goes on for as long as the other thread is the quicker one.
    fn read(&self, spare: &mut Pins) -> u64 {
        loop {
            let mut pins = self.entry.lock();
            if pins.pinned {
                return pins.read();
            }
            drop(pins);
            let Ok(fault) = self.registration.begin(self.page, Duration::from_secs(1)) else {
                continue;
            };
            // The walk comes before the check.
            if !spare.pin() {
                continue;
            }
            if self.wrong == Wrong::NoRetry {
                thread::sleep(Duration::from_micros(20));
            }
            let lock = self.driver.0.lock();
            let installed = (self.wrong == Wrong::NoRetry || !fault.retry(&lock)).then(|| {
                let mut pins = self.entry.lock();
                std::mem::swap(&mut *pins, spare);
                pins.read()
            });
            drop(lock);
            spare.unpin();
            if let Some(word) = installed {
                return word;
            }
        }
    }
}

/// Rounds, and in how many of them guest and device differed; `None` without KVM.
fn compare(wrong: Wrong) -> Option<(u64, u64)> {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, Deadlines::default());
    let unotify = || space.watch(Arc::new(Unotify::new()), arena).unwrap();
    let _watched = (wrong != Wrong::NoSource).then(unotify);
    let buffer = space.map(Map::anonymous(2 * PAGE)).unwrap();
    let (page, other) = (self::page(buffer, 0), self::page(buffer, 1));
    let mut guest = match Guest::new(buffer) {
        Err(error @ KvmError::NoKvm(_)) => {
            eprintln!("SKIPPED: {error}");
            return None;
        }
        guest => guest.unwrap(),
    };
    let entry = Arc::new(Entry {
        pins: Mutex::new(Pins::new(page)),
        waiting: AtomicUsize::new(0),
    });
    let driver = Arc::new(Driver::default());
    let device = shootdown::Device::new("pins", Tlb(entry.clone(), page));
    let target = Target { device, tag: 0 };
    let registration = space.register(page, driver.clone(), &[target]).unwrap();
    let device = Device {
        entry,
        driver,
        registration: &registration,
        page,
        wrong,
    };
    let store = |at: Range, value: u64| {
        // SAFETY: the test's own page, mapped for writing.
        unsafe { (start(at) as *mut u64).write_volatile(value) };
    };
    let stop = AtomicBool::new(false);
    let differences = thread::scope(|scope| {
        // The device is at work all the time.
        scope.spawn(|| {
            let mut spare = Pins::new(page);
            while !stop.load(SeqCst) {
                device.read(&mut spare);
                device.entry.let_others_go_first();
                device.evict();
                device.entry.let_others_go_first();
            }
        });
        let (mut differences, mut spare) = (0, Pins::new(page));
        for round in 1..=ROUNDS {
            let (old, moved) = (2 * round, 2 * round + 1);
            store(page, old);
            device.read(&mut spare);
            assert_eq!(guest.read(page.start()).unwrap(), Some(old));
            let (at, len) = (start(page), PAGE as usize);
            let (result, new) = match round % 3 {
                0 => {
                    let advice = libc::MADV_DONTNEED as usize;
                    (raw(libc::SYS_madvise, [at, len, advice, 0, 0, 0]), 0)
                }
                1 => (Ok(usize::from(!map_fixed(page))), 0),
                _ => {
                    assert!(map_fixed(other));
                    store(other, moved);
                    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
                    let args = [start(other), len, len, flags, at, 0];
                    (raw(libc::SYS_mremap, args).map(|_| 0), moved)
                }
            };
            assert_eq!(result, Ok(0));
            // Guest and device, as they are when the call has returned.
            let read = device.read(&mut spare);
            let truth = guest.read(page.start()).unwrap();
            assert_eq!(truth, Some(new), "the kernel keeps its guests coherent");
            differences += u64::from(Some(read) != truth);
        }
        stop.store(true, SeqCst);
        differences
    });
    Some((ROUNDS, differences))
}

fn report(who: &str, (rounds, differences): (u64, u64)) {
    eprintln!("{who}: guest and device differ in {differences} of {rounds} rounds");
}

#[test]
fn guest_and_device_agree_where_foreign_calls_wait() {
    if in_child("guest_and_device_agree_where_foreign_calls_wait")
        && let Some(seen) = compare(Wrong::Nothing)
    {
        report("unotify", seen);
        assert_eq!(seen.1, 0);
    }
}

#[test]
fn without_a_source_they_differ() {
    if in_child("without_a_source_they_differ")
        && let Some(seen) = compare(Wrong::NoSource)
    {
        report("no source", seen);
        assert!(seen.1 > 0);
    }
}

#[test]
fn a_driver_that_does_not_check_its_retry_is_found() {
    if in_child("a_driver_that_does_not_check_its_retry_is_found")
        && let Some(seen) = compare(Wrong::NoRetry)
    {
        report("no retry", seen);
        assert!(seen.1 > 0);
    }
}
