//! One thing to do n times.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Cause, Completion, Deadlines, DeviceTlb, FlushCommand, Map, NotifierLock,
    Outcome, PageSize, ProcessMemory, Range, Registration, Scope, Target,
};

use crate::ground::{Empty, Ground, Tlb, interval};
use crate::srcu::Srcu;

type Run = Box<dyn FnMut(u64) -> Duration>;

/// What is done, and how long n times of it take.
pub struct Case {
    /// What criterion calls it.
    pub name: String,
    run: Run,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish()
    }
}

impl Case {
    /// Times `once` as a loop. It is given the number of the time.
    pub(crate) fn new(name: impl Into<String>, mut once: impl FnMut(usize) + 'static) -> Self {
        let mut at = 0;
        Self::timed(name, move |times| {
            let begun = Instant::now();
            for _ in 0..times {
                once(at);
                at = at.wrapping_add(1);
            }
            begun.elapsed()
        })
    }

    /// One that takes the time itself.
    pub fn timed(name: impl Into<String>, run: impl FnMut(u64) -> Duration + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }

    /// Does it `times` times.
    pub fn run(&mut self, times: u64) -> Duration {
        (self.run)(times)
    }
}

/// One external invalidation, with no change.
pub fn shoot(space: &AddressSpace, range: Range) {
    let open = space
        .begin_invalidation(range, Cause::External)
        .expect("an invalidation");
    open.end(Outcome::Changed).expect("its end");
}

/// Invalidations of single pages that hit so many of `count` registrations.
pub fn invalidation(count: usize, hits: usize) -> Case {
    let ground = Ground::new(count);
    let queries = ground.queries(hits);
    let (space, registrations) = ground.space();
    Case::new(format!("invalidation/{hits} hits/{count}"), move |nth| {
        shoot(&space, queries[nth % queries.len()]);
        black_box(&registrations);
    })
}

/// The same queries of iset.
pub fn iset_query(count: usize, hits: usize) -> Case {
    let ground = Ground::new(count);
    let (queries, index) = (ground.queries(hits), ground.iset());
    Case::new(format!("iset query/{hits} hits/{count}"), move |nth| {
        let query = interval(queries[nth % queries.len()]);
        black_box(index.iter(query).map(|(_, value)| *value).sum::<u64>());
    })
}

/// The same queries of a sorted `Vec`, which knows disjoint ranges only.
pub fn vec_query(count: usize, hits: usize) -> Case {
    let ground = Ground::new(count);
    let queries = ground.queries(hits);
    let mut sorted: Vec<_> = ground.ranges.iter().map(|one| interval(*one)).collect();
    sorted.sort_by_key(|one| one.start);
    Case::new(
        format!("sorted vec query/{hits} hits/{count}"),
        move |nth| {
            let query = interval(queries[nth % queries.len()]);
            let at = sorted.partition_point(|one| one.start < query.end);
            black_box(at > 0 && sorted[at - 1].end > query.start);
        },
    )
}

/// A registration that is made and given up, beside `count` others.
pub fn pair(count: usize) -> Case {
    let ground = Ground::new(count);
    let queries = ground.queries(0);
    let (space, registrations) = ground.space();
    let handler = Arc::new(Empty);
    Case::new(format!("register, unregister/{count}"), move |nth| {
        let range = queries[nth % queries.len()];
        let one = space.register(range, handler.clone(), &[]);
        one.expect("a registration").unregister().expect("its end");
        black_box(&registrations);
    })
}

/// The same, many together: made visible at once, and given up at once. The time of one.
pub fn bulk(count: usize, together: usize) -> Case {
    let ground = Ground::new(count);
    let queries = ground.queries(0);
    let (space, registrations) = ground.space();
    let handler = Arc::new(Empty);
    let mut at = 0;
    let name = format!("register, unregister {together} together/{count}");
    Case::timed(name, move |times| {
        black_box(&registrations);
        let begun = Instant::now();
        let mut left = times as usize;
        while left > 0 {
            let now = left.min(together);
            let prepared = (at..at + now).map(|nth| {
                let range = queries[nth % queries.len()];
                let one = space.prepare(range, handler.clone(), &[]);
                one.expect("a registration")
            });
            let all = space.insert_all(prepared.collect());
            for end in Registration::unregister_all(&all.expect("all of them")) {
                end.expect("its end");
            }
            (left, at) = (left - now, at + now);
        }
        begun.elapsed()
    })
}

/// Insertion and removal of the same ranges in iset.
pub fn iset_pair(count: usize) -> Case {
    let ground = Ground::new(count);
    let (queries, mut index) = (ground.queries(0), ground.iset());
    Case::new(format!("iset insert, remove/{count}"), move |nth| {
        let range = interval(queries[nth % queries.len()]);
        index.force_insert(range.clone(), 7);
        black_box(index.remove(range));
    })
}

/// An unregister with nothing in flight, from detach to "no callback runs or will run": with the map lock held, where the release is put
/// off until the lock is dropped, which is not counted.
pub fn unregister(count: usize) -> Case {
    const BATCH: u64 = 256;
    let ground = Ground::new(count);
    let queries = ground.queries(0);
    let (space, registrations) = ground.space();
    let handler = Arc::new(Empty);
    let mut made = Vec::with_capacity(BATCH as usize);
    Case::timed(format!("unregister/{count}"), move |times| {
        black_box(&registrations);
        let mut took = Duration::ZERO;
        let mut left = times;
        while left > 0 {
            let batch = left.min(BATCH);
            for nth in 0..batch {
                let range = queries[(left + nth) as usize % queries.len()];
                let one = space.register(range, handler.clone(), &[]);
                made.push(one.expect("a registration"));
            }
            let held = space.lock_write().expect("the map lock");
            let begun = Instant::now();
            for one in &made {
                one.unregister().expect("its end");
            }
            took += begun.elapsed();
            drop(held);
            made.clear();
            left -= batch;
        }
        took
    })
}

/// A grace period of an SRCU that protects nothing.
pub fn grace() -> Case {
    let srcu = Srcu::default();
    Case::new("srcu grace period", move |_| srcu.grace())
}

/// Its read section.
pub fn section() -> Case {
    let srcu = Srcu::default();
    Case::new("srcu section", move |_| srcu.section())
}

/// What a driver does at a fault of which nothing disturbs the entry.
pub fn fault() -> Case {
    let space = AddressSpace::without_memory(Deadlines::default());
    let range = Range::new(1u64 << 32, 1 << 30).expect("a range");
    let registration = space.register(range, Arc::new(Empty), &[Tlb::target(Duration::ZERO)]);
    let registration = registration.expect("a registration");
    let lock = NotifierLock::new(());
    Case::new("begin, lock, retry", move |nth| {
        let entry = Range::new((1u64 << 32) + ((nth as u64 & 0xffff) << 12), 4096);
        let fault = registration
            .begin(entry.expect("a page"), Duration::from_secs(1))
            .expect("undisturbed");
        let held = lock.lock();
        assert!(!fault.retry(&held));
        drop(held);
        black_box(&space);
    })
}

/// The part of it that any driver has: its lock.
pub fn notifier_lock() -> Case {
    let lock = NotifierLock::new(());
    Case::new("lock", move |_| {
        black_box(&*lock.lock());
    })
}

/// Other threads, which stay for as long as their case, as those of a process do.
#[derive(Debug)]
pub struct Others(Vec<Other>);

#[derive(Debug)]
struct Other {
    /// How often, and when it is to start; then how long it took.
    ask: std::sync::mpsc::Sender<(u64, Arc<Barrier>)>,
    took: std::sync::mpsc::Receiver<Duration>,
}

/// Threads that start at the same time.
#[derive(Debug)]
struct Barrier {
    ready: AtomicU64,
    threads: u64,
}

impl Barrier {
    /// Waits until all are ready, and does it so many times.
    fn time(&self, times: u64, once: &mut dyn FnMut(u64)) -> Duration {
        self.ready.fetch_add(1, Relaxed);
        while self.ready.load(Relaxed) < self.threads {
            std::hint::spin_loop();
        }
        let begun = Instant::now();
        (0..times).for_each(once);
        begun.elapsed()
    }
}

impl Others {
    /// One for each, which does that when it is asked to; it is given the number of the time.
    pub fn new<F: FnMut(u64) + Send + 'static>(others: impl IntoIterator<Item = F>) -> Self {
        let other = |mut once: F| {
            let (ask, asked) = std::sync::mpsc::channel::<(u64, Arc<Barrier>)>();
            let (done, took) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                while let Ok((times, barrier)) = asked.recv() {
                    let _ = done.send(barrier.time(times, &mut once));
                }
            });
            Other { ask, took }
        };
        Self(others.into_iter().map(other).collect())
    }

    /// The time until all are done, with `once` on this thread.
    pub fn beside(&self, times: u64, mut once: impl FnMut(u64)) -> Duration {
        let barrier = Arc::new(Barrier {
            ready: AtomicU64::new(0),
            threads: self.0.len() as u64 + 1,
        });
        for other in &self.0 {
            let asked = other.ask.send((times, barrier.clone()));
            asked.expect("the other thread");
        }
        let mine = barrier.time(times, &mut once);
        let others = self.0.iter();
        others.fold(mine, |most, other| {
            most.max(other.took.recv().expect("the other thread"))
        })
    }
}

/// A space with a registration of 1 MiB for each of so many threads.
fn registered(threads: u64) -> (AddressSpace, Vec<(shootdown::Registration, Range)>) {
    let space = AddressSpace::without_memory(Deadlines::default());
    let one = |nth: u64| {
        let range = Range::new((nth + 1) << 32, 1 << 20).expect("a range");
        let registration = space.register(range, Arc::new(Empty), &[]);
        (registration.expect("a registration"), range)
    };
    let registrations = (0..threads).map(one).collect();
    (space, registrations)
}

/// So many threads, each with a registered range of its own; all in one space, or each in its own. The time of one operation of each
/// thread.
pub fn disjoint(threads: usize, one_space: bool) -> Case {
    // As many registrations in each space, so that only what they share differs.
    let spaces: Vec<_> = (0..threads).map(|_| registered(threads as u64)).collect();
    let shooter = |nth: usize| {
        let space = spaces[if one_space { 0 } else { nth }].0.clone();
        let range = spaces[0].1[nth].1;
        move |_| shoot(&space, range)
    };
    let (mut mine, others) = (shooter(0), Others::new((1..threads).map(shooter)));
    let name = if one_space { "one space" } else { "its own" };
    Case::timed(format!("{threads} threads/{name}"), move |times| {
        black_box(&spaces);
        others.beside(times, &mut mine)
    })
}

/// Faults of so many threads, in disjoint parts of one registration. Each has a lock of its own, as contexts have.
pub fn faults(threads: usize) -> Case {
    let (space, mut registrations) = registered(1);
    let (registration, range) = registrations.pop().expect("one");
    let registration = Arc::new(registration);
    let part = range.len() as u64 / threads as u64;
    let faults = |thread: usize| {
        let (registration, lock) = (registration.clone(), NotifierLock::new(()));
        let start = range.start().get() + thread as u64 * part;
        move |nth: u64| {
            let at = start + (nth << 12) % part;
            let entry = Range::new(at, 4096).expect("a page");
            let fault = registration
                .begin(entry, Duration::from_secs(1))
                .expect("undisturbed");
            let held = lock.lock();
            assert!(!fault.retry(&held));
        }
    };
    let (mut mine, others) = (faults(0), Others::new((1..threads).map(faults)));
    Case::timed(format!("faults/{threads} threads"), move |times| {
        black_box(&space);
        others.beside(times, &mut mine)
    })
}

/// A shootdown over so many passive devices of this latency, one registration each.
pub fn devices(count: usize, latency: Duration) -> Case {
    let space = AddressSpace::without_memory(Deadlines::default());
    let range = Range::new(1u64 << 32, 1 << 12).expect("a range");
    let registrations: Vec<_> = (0..count)
        .map(|_| {
            let one = space.register(range, Arc::new(Empty), &[Tlb::target(latency)]);
            one.expect("a registration")
        })
        .collect();
    Case::new(format!("devices/{count}"), move |_| {
        shoot(&space, range);
        black_box(&registrations);
    })
}

/// What that cannot do without: as many commands, doorbells and looks at the devices.
pub fn bare_devices(count: usize, latency: Duration) -> Case {
    let page = Range::new(1u64 << 32, 1 << 12).expect("a page");
    let command = FlushCommand {
        tag: 0,
        scope: Scope::Pages {
            range: page,
            page_size: PageSize::FourKiB,
        },
    };
    let devices: Vec<Box<dyn DeviceTlb>> = (0..count)
        .map(|_| Box::new(Tlb::new(latency)) as Box<dyn DeviceTlb>)
        .collect();
    let mut tickets = Vec::with_capacity(count);
    Case::new(format!("bare devices/{count}"), move |_| {
        tickets.clear();
        for device in &devices {
            device.issue(command);
            tickets.push(device.dispatch());
        }
        for (device, ticket) in devices.iter().zip(&tickets) {
            while device.poll(*ticket) == Completion::Pending {
                std::hint::spin_loop();
            }
        }
    })
}

/// Unmapping a touched 4 KiB page of a managed space, with a handler and a device that answers at once.
pub fn managed_unmap() -> Case {
    let memory = ProcessMemory::reserve(1 << 30).expect("an arena");
    let space = AddressSpace::managed(Arc::new(memory), Deadlines::default());
    let hole = space.map(Map::anonymous(4096)).expect("a page");
    let around = Range::new(hole.start(), 1 << 20).expect("a range");
    let target: &[Target] = &[Tlb::target(Duration::ZERO)];
    let registration = space.register(around, Arc::new(Empty), target);
    space.unmap(hole).expect("an unmap");
    Case::timed("unmap/managed", move |times| {
        black_box(&registration);
        let mut took = Duration::ZERO;
        for _ in 0..times {
            let page = space
                .map(Map::anonymous(4096).at(hole.start()))
                .expect("a page");
            touch(page.start().get());
            let begun = Instant::now();
            space.unmap(page).expect("an unmap");
            took += begun.elapsed();
        }
        took
    })
}

fn touch(at: u64) {
    // SAFETY: the caller has just mapped a page there for itself.
    unsafe { (at as *mut u8).write_volatile(1) };
}

/// What that comes to bare: fresh pages without access over a touched one, so that nobody else is given the address.
pub fn raw_unmap() -> Case {
    let len = 4096;
    let map = move |at: *mut libc::c_void, protection| {
        let fixed = if at.is_null() { 0 } else { libc::MAP_FIXED };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
        // SAFETY: a page of the kernel's choice, or over one that came from here.
        let page = unsafe { libc::mmap(at, len, protection, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        page
    };
    // As large as the other's arena, so that the neighbours are alike.
    // SAFETY: new memory of the kernel's choice.
    let arena = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), 1 << 30, libc::PROT_NONE, flags, -1, 0)
    };
    assert_ne!(arena, libc::MAP_FAILED);
    let arena = arena as usize;
    Case::timed("unmap/raw", move |times| {
        let mut took = Duration::ZERO;
        for _ in 0..times {
            let page = map(
                arena as *mut libc::c_void,
                libc::PROT_READ | libc::PROT_WRITE,
            );
            // SAFETY: the page that was just mapped.
            unsafe { libc::madvise(page, len, libc::MADV_DONTFORK) };
            touch(page as u64);
            let begun = Instant::now();
            map(page, libc::PROT_NONE);
            // SAFETY: as above.
            unsafe { libc::madvise(page, len, libc::MADV_DONTFORK) };
            took += begun.elapsed();
        }
        took
    })
}

/// Invalidations beside a thread that registers and unregisters without a pause, if it does.
#[derive(Debug)]
pub struct BesideWriter {
    /// The invalidations.
    pub case: Case,
    /// Whether the writer writes.
    pub writes: Arc<AtomicBool>,
    /// Pairs that it has made, and the time it has had.
    pub made: Arc<[AtomicU64; 2]>,
    stop: Arc<AtomicBool>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl BesideWriter {
    /// Over `count` registrations; invalidations of so many hits.
    pub fn new(count: usize, hits: usize) -> Self {
        let ground = Ground::new(count);
        let queries = ground.queries(hits);
        let free = ground.queries(0);
        let (space, registrations) = ground.space();
        let writes = Arc::new(AtomicBool::new(false));
        let stop = Arc::new(AtomicBool::new(false));
        let made = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let writer = {
            let (space, writes, stop, made) =
                (space.clone(), writes.clone(), stop.clone(), made.clone());
            std::thread::spawn(move || {
                let handler = Arc::new(Empty);
                let mut nth = 0;
                while !stop.load(Relaxed) {
                    if !writes.load(Relaxed) {
                        std::thread::sleep(Duration::from_micros(50));
                        continue;
                    }
                    let begun = Instant::now();
                    for _ in 0..64 {
                        nth += 1;
                        // Not where it would be hit: that is what the reader's own figure is for.
                        let range = free[nth % free.len()];
                        let one = space.register(range, handler.clone(), &[]);
                        one.expect("a registration").unregister().expect("its end");
                    }
                    made[0].fetch_add(64, Relaxed);
                    made[1].fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
                }
            })
        };
        let case = Case::new(format!("beside a writer/{hits} hits/{count}"), move |nth| {
            shoot(&space, queries[nth % queries.len()]);
            black_box(&registrations);
        });
        Self {
            case,
            writes,
            made,
            stop,
            writer: Some(writer),
        }
    }
}

impl Drop for BesideWriter {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}
