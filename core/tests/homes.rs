//! Threads that come and go: each has a place of its own to count and record in for as long as it lives, so that none waits for another.
//! Each test is a process of its own, as those places are a process's.

#[path = "support/child.rs"]
mod child;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Barrier};

use child::in_child;
use shootdown::{AddressSpace, Cause, Deadlines, Kind, Notifier, Outcome, Range, Registration};

/// Places that are one thread's at a time.
const HOMES: usize = 64;

/// Threads that the kernel knows of this process.
fn live() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

struct Empty;

impl Notifier for Empty {}

/// A space with a registered range for each of so many threads.
struct Ground {
    space: AddressSpace,
    registered: Vec<Registration>,
}

impl Ground {
    fn new(threads: usize) -> Self {
        let space = AddressSpace::without_memory(Deadlines::default());
        let register = |nth: usize| {
            let range = Range::new((nth as u64 + 1) << 32, 4096).unwrap();
            space.register(range, Arc::new(Empty), &[]).unwrap()
        };
        let registered = (0..threads).map(register).collect();
        Self { space, registered }
    }

    fn shoot(&self, nth: usize) {
        let range = self.registered[nth].range();
        let open = self.space.begin_invalidation(range, Cause::External);
        open.unwrap().end(Outcome::Changed).unwrap();
    }

    /// So many invalidations, each by a thread of its own, all of which live at the same time, and not any more afterwards. They ask for
    /// their places at once.
    fn shoot_at_once(&self, threads: usize) {
        let all = Barrier::new(threads);
        let before = live();
        std::thread::scope(|scope| {
            for nth in 0..threads {
                let all = &all;
                scope.spawn(move || {
                    all.wait();
                    self.shoot(nth);
                    all.wait();
                });
            }
        });
        // Whoever joins a thread is told before the kernel has forgotten it.
        while live() > before {
            std::thread::yield_now();
        }
    }

    /// The shard of the newest record of each range's invalidations.
    fn shards(&self) -> HashMap<usize, usize> {
        let nth = |start: u64| (start >> 32) as usize - 1;
        let records = self.space.records();
        let hits = records
            .iter()
            .filter(|one| matches!(one.kind, Kind::Start | Kind::Passed));
        hits.map(|one| (nth(one.a), one.shard)).collect()
    }
}

/// How many shards there are in it, and how many of those are one thread's.
fn apart(shards: &HashMap<usize, usize>) -> (usize, usize) {
    let shards: HashSet<_> = shards.values().collect();
    let own = shards.iter().filter(|shard| ***shard < HOMES).count();
    (shards.len(), own)
}

#[test]
fn a_thread_takes_over_the_place_of_one_that_has_ended() {
    if !in_child("a_thread_takes_over_the_place_of_one_that_has_ended") {
        return;
    }
    const THREADS: usize = 48;
    for round in 0..2 * HOMES / THREADS + 10 {
        let ground = Ground::new(THREADS);
        ground.shoot_at_once(THREADS);
        let shards = ground.shards();
        assert_eq!(
            apart(&shards),
            (THREADS, THREADS),
            "round {round}: {shards:?}"
        );
        assert_eq!(ground.space.stats().hits, THREADS as u64);
    }
}

#[test]
fn more_threads_than_places_share_the_rest() {
    if !in_child("more_threads_than_places_share_the_rest") {
        return;
    }
    const THREADS: usize = 3 * HOMES;
    for _ in 0..2 {
        let ground = Ground::new(THREADS);
        ground.shoot_at_once(THREADS);
        let shards = ground.shards();
        assert_eq!(shards.len(), THREADS);
        let (all, own) = apart(&shards);
        // This thread and the test's have some.
        assert!(own > HOMES - 4 && all > own, "{all}, {own}: {shards:?}");
        let alone = |shard: usize| shards.values().filter(|one| **one == shard).count() == 1;
        assert!(
            shards
                .values()
                .all(|shard| *shard >= HOMES || alone(*shard))
        );
        let records = ground.space.records();
        let mut changed = records.iter().filter(|one| one.kind == Kind::Passed);
        assert!(changed.all(|one| one.shard < HOMES));
        assert_eq!(ground.space.stats().hits, THREADS as u64);
    }
}

#[test]
fn in_a_child_by_fork_nobody_takes_the_place_of_who_forked() {
    if !in_child("in_a_child_by_fork_nobody_takes_the_place_of_who_forked") {
        return;
    }
    const THREADS: usize = 2 * HOMES;
    let ground = Ground::new(THREADS + 1);
    // All places have been given out.
    ground.shoot_at_once(THREADS);
    // The space is the child's own from here on.
    // SAFETY: the child uses memory of its own, and ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let ground = Ground::new(THREADS + 1);
        ground.shoot(THREADS);
        ground.shoot_at_once(THREADS);
        let shards = ground.shards();
        let alone = shards.values().filter(|one| **one == shards[&THREADS]);
        let status = i32::from(shards.len() != THREADS + 1 || alone.count() != 1);
        // SAFETY: as above.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: the child's number, and room for its status.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!((waited, status), (child, 0));
}
