//! The framework against the oracle: an accelerator with a TLB of its own works on real process memory, through frames, while
//! other threads map, unmap, discard, protect and remap it and registrations come and go. The oracle, which knows no
//! registration, must see no stale access; with one guard of the *driver* taken out it must see some.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{
    Addr, AddressSpace, Completion, Deadlines, Device, DeviceTlb, Drain, FlushCommand, Frame,
    Issue, Limits, Map, Notifier, NotifierLock, Op, Outcome, PageSize, PageSizes, Range,
    Registration, Rights, Scope, Target, Ticket, WouldBlock,
};
use shootdown_hw_model::{Access, Bus, ModelMemory, Stamp};

const PAGE: u64 = 4096;

/// What the driver does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Plant {
    Nothing,
    /// The flush is reported as done and is not.
    NoFlush,
    /// The sequence is not checked before an entry is installed (R9).
    NoRetry,
}

#[derive(Clone, Copy)]
struct Entry {
    frame: Frame,
    writable: bool,
    stamp: Stamp,
}

/// The device: a TLB whose lock is held during each access, so that a flush has drained when it returns.
struct Accelerator {
    number: u32,
    bus: Bus,
    plant: Plant,
    entries: Mutex<HashMap<u64, Entry>>,
    done: AtomicU64,
    accesses: AtomicU64,
}

impl Accelerator {
    /// One access through the TLB; false on a miss.
    fn access(&self, space: u64, addr: Addr, write: bool, value: u64) -> bool {
        let entries = self.entries.lock().unwrap();
        let Some(entry) = entries
            .get(&(addr.get() / PAGE))
            .filter(|entry| entry.writable || !write)
        else {
            return false;
        };
        let access = Access {
            device: self.number,
            context: 0,
            space,
            addr,
            len: 8,
            write,
            frame: entry.frame,
            stamp: entry.stamp,
        };
        if write {
            self.bus.write(&access, &value.to_le_bytes());
        } else {
            self.bus.read(&access, &mut [0; 8]);
        }
        self.accesses.fetch_add(1, Relaxed);
        true
    }
}

struct Tlb(Arc<Accelerator>);

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 64,
            commands_per_batch: 4,
            full_flush_cost: 2,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        if self.0.plant == Plant::NoFlush {
            return Issue::Queued;
        }
        let mut entries = self.0.entries.lock().unwrap();
        match command.scope {
            Scope::Pages { range, .. } => {
                entries.retain(|page, _| !range.holds(Addr::new(page * PAGE)))
            }
            Scope::Tag | Scope::Device => entries.clear(),
        }
        self.0.done.fetch_add(1, SeqCst);
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }

    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

struct Driver {
    lock: NotifierLock<()>,
    releases: Arc<AtomicU64>,
    open: AtomicU64,
}

impl Notifier for Driver {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let _order = self.lock.lock_for(op)?;
        self.open.fetch_add(1, SeqCst);
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.open.fetch_sub(1, SeqCst);
    }

    fn release(&self) {
        assert_eq!(self.open.load(SeqCst), 0, "released between start and end");
        self.releases.fetch_add(1, SeqCst);
    }
}

/// Resolves a miss: begin, walk, retry, install.
fn resolve(
    space: &AddressSpace,
    registration: &Registration,
    driver: &Driver,
    device: &Accelerator,
    addr: Addr,
    write: bool,
) {
    let page = Range::page(addr, PageSize::FourKiB);
    let Ok(mut fault) = registration.begin(page, Duration::from_secs(10)) else {
        return;
    };
    for _ in 0..4 {
        let Some(found) = space.translate(addr) else {
            return;
        };
        if write && !found.rights.contains(Rights::WRITE) {
            return;
        }
        let frame = Frame(found.frame.0 + (page.start().get() - found.page.start().get()) / PAGE);
        if device.plant == Plant::NoRetry {
            std::thread::yield_now();
        }
        let guard = driver.lock.lock();
        if device.plant == Plant::NoRetry || !fault.retry(&guard) {
            let entry = Entry {
                frame,
                writable: found.rights.contains(Rights::WRITE),
                stamp: device.bus.oracle().stamp(space.id(), page.start()),
            };
            device
                .entries
                .lock()
                .unwrap()
                .insert(page.start().get() / PAGE, entry);
            return;
        }
        drop(guard);
        if fault.again().is_err() {
            return;
        }
    }
}

struct Outcomes {
    stale: u64,
    accesses: u64,
    invalidations: u64,
    findings: String,
}

fn run(plant: Plant, seed: u64, most: Duration) -> Outcomes {
    let bus = Bus::new(8192).unwrap();
    let memory = ModelMemory::new(&bus, 64 << 20).unwrap();
    let arena = shootdown::Memory::arena(&*memory);
    let space = AddressSpace::managed(memory, Deadlines::default());
    let releases = Arc::new(AtomicU64::new(0));
    let inserted = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let pool: Vec<Addr> = (0..32)
        .map(|nth| Addr::new(arena.start().get() + nth * 16 * PAGE))
        .collect();
    let mut accelerators = Vec::new();
    std::thread::scope(|scope| {
        for number in 0..2 {
            let device = Arc::new(Accelerator {
                number,
                bus: bus.clone(),
                plant,
                entries: Mutex::new(HashMap::new()),
                done: AtomicU64::new(0),
                accesses: AtomicU64::new(0),
            });
            accelerators.push(device.clone());
            let handle = Device::new(format!("accelerator {number}"), Tlb(device.clone()));
            let (space, pool, stop, releases, inserted) =
                (&space, &pool, &stop, releases.clone(), &inserted);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed ^ u64::from(number) << 8);
                let driver = Arc::new(Driver {
                    lock: NotifierLock::new(()),
                    releases,
                    open: AtomicU64::new(0),
                });
                let targets = [Target {
                    device: handle,
                    tag: 0,
                }];
                while !stop.load(Relaxed) {
                    inserted.fetch_add(1, SeqCst);
                    let registration = space
                        .register(Range::ALL, driver.clone(), &targets)
                        .unwrap();
                    for _ in 0..2000 {
                        let base = pool[rng.random_range(0..pool.len())];
                        let addr = Addr::new(
                            base.get()
                                + rng.random_range(0..16) * PAGE
                                + 8 * rng.random_range(0..512),
                        );
                        let write = rng.random_bool(0.5);
                        if !device.access(space.id(), addr, write, rng.random()) {
                            resolve(space, &registration, &driver, &device, addr, write);
                        }
                    }
                    // The device's work for this registration is over: its entries go before it does.
                    device.entries.lock().unwrap().clear();
                    registration.unregister().unwrap();
                }
            });
        }
        for worker in 0..2u64 {
            let (space, pool, stop) = (&space, &pool, &stop);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed ^ worker << 16 ^ 0xabcd);
                let mine: Vec<Addr> = pool
                    .iter()
                    .copied()
                    .skip(worker as usize)
                    .step_by(2)
                    .collect();
                let mut mapped = vec![false; mine.len()];
                while !stop.load(Relaxed) {
                    let nth = rng.random_range(0..mine.len());
                    let whole = Range::new(mine[nth], 16 * PAGE).unwrap();
                    if !mapped[nth] {
                        space.map(Map::anonymous(16 * PAGE).at(mine[nth])).unwrap();
                        mapped[nth] = true;
                        continue;
                    }
                    let first = rng.random_range(0..16);
                    let part = Range::new(
                        mine[nth].get() + first * PAGE,
                        rng.random_range(1..=16 - first) * PAGE,
                    )
                    .unwrap();
                    match rng.random_range(0..6) {
                        0 => space.discard(part).unwrap(),
                        1 => space.protect(part, Rights::READ).unwrap(),
                        2 => space.protect(part, Rights::READ_WRITE).unwrap(),
                        3 => {
                            let to = (0..mine.len()).find(|one| !mapped[*one]);
                            if let Some(to) = to {
                                space.remap(whole, mine[to]).unwrap();
                                mapped[to] = true;
                                mapped[nth] = false;
                            }
                        }
                        4 => {
                            let guard = space.lock_write().unwrap();
                            guard.unmap(whole).unwrap();
                            mapped[nth] = false;
                        }
                        _ => {
                            space.unmap(whole).unwrap();
                            mapped[nth] = false;
                        }
                    }
                }
            });
        }
        let begun = Instant::now();
        while begun.elapsed() < most
            && (plant == Plant::Nothing || bus.oracle().stale_accesses() == 0)
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, SeqCst);
    });
    let invalidations = space.stats().invalidations;
    space.exit().unwrap();
    assert_eq!(
        releases.load(SeqCst),
        inserted.load(SeqCst),
        "each registration is released once"
    );
    assert_eq!(space.registrations(), 0);
    drop(space);
    assert_eq!(
        bus.physical().free_frames(),
        bus.physical().total(),
        "no frame is leaked"
    );
    Outcomes {
        stale: bus.oracle().stale_accesses(),
        accesses: accelerators
            .iter()
            .map(|one| one.accesses.load(Relaxed))
            .sum(),
        invalidations,
        findings: bus
            .oracle()
            .findings()
            .iter()
            .take(3)
            .map(|one| format!("{one}\n"))
            .collect(),
    }
}

#[test]
fn no_access_is_stale_while_memory_changes_and_registrations_come_and_go() {
    for seed in 1..=3 {
        let outcomes = run(Plant::Nothing, seed, Duration::from_secs(2));
        println!(
            "seed {seed}: {} accesses beside {} invalidations",
            outcomes.accesses, outcomes.invalidations
        );
        assert!(
            outcomes.accesses > 1000 && outcomes.invalidations > 100,
            "the run did something"
        );
        assert_eq!(outcomes.stale, 0, "seed {seed}:\n{}", outcomes.findings);
    }
}

#[test]
fn a_driver_that_does_not_flush_is_found_by_the_oracle() {
    let outcomes = run(Plant::NoFlush, 1, Duration::from_secs(20));
    assert!(outcomes.stale > 0);
}

#[test]
fn a_driver_that_does_not_check_the_sequence_is_found_by_the_oracle() {
    let outcomes = run(Plant::NoRetry, 1, Duration::from_secs(20));
    assert!(outcomes.stale > 0);
}
