//! Many registrations at once: all or none become visible, and all are given up together, each in its own right.

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Cause, Drain, InsertError, Notifier, Op, Outcome, Prepared, Range, Registration,
    SpacePin, UnregisterError, Unregistered, WouldBlock,
};
use support::{Counting, space};

const MANY: u64 = 200;

fn page(nth: u64) -> Range {
    Range::new(nth << 12, 1 << 12).unwrap()
}

fn prepared(space: &AddressSpace, handler: &Arc<impl Notifier>) -> Vec<Prepared> {
    let one = |nth| space.prepare(page(nth * 3), handler.clone(), &[]).unwrap();
    (0..MANY).map(one).collect()
}

fn shoot(space: &AddressSpace, range: Range) {
    let open = space.begin_invalidation(range, Cause::External).unwrap();
    open.end(Outcome::Changed).unwrap();
}

#[test]
fn an_invalidation_finds_all_of_them_or_none() {
    let space = space();
    let mut found_none = false;
    let mut found_all = false;
    for _ in 0..60 {
        let handler = Arc::new(Counting::default());
        let many = prepared(&space, &handler);
        let start = Arc::new(Barrier::new(2));
        let walker = {
            let (space, start) = (space.clone(), start.clone());
            thread::spawn(move || {
                let mut found = Vec::new();
                start.wait();
                for _ in 0..40 {
                    let before = space.stats().hits;
                    shoot(&space, Range::ALL);
                    found.push(space.stats().hits - before);
                }
                found
            })
        };
        start.wait();
        let registrations = space.insert_all(many).unwrap();
        let found = walker.join().unwrap();
        assert!(found.iter().all(|one| [0, MANY].contains(one)), "{found:?}");
        assert!(found.is_sorted());
        found_none |= found[0] == 0;
        found_all |= found[39] == MANY;
        let ends = Registration::unregister_all(&registrations);
        assert!(ends.iter().all(|one| *one == Ok(Unregistered::Released)));
        assert_eq!(handler.releases.load(SeqCst), MANY);
        assert_eq!(space.registrations(), 0);
    }
    assert!(found_none && found_all, "both were met");
}

#[test]
fn none_is_inserted_where_one_is_refused() {
    let (here, there) = (space(), space());
    let handler = Arc::new(Counting::default());
    let mut many = prepared(&here, &handler);
    many.push(there.prepare(page(7), handler.clone(), &[]).unwrap());
    let error = here.insert_all(many).unwrap_err();
    assert_eq!(error, InsertError::AnotherSpace { range: page(7) });
    let many = prepared(&here, &handler);
    here.exit().unwrap();
    let error = here.insert_all(many).unwrap_err();
    assert_eq!(error, InsertError::Exiting { range: page(0) });
    let stats = here.stats();
    assert_eq!((stats.inserts, stats.releases), (0, 0));
    assert_eq!(handler.releases.load(SeqCst), 0, "it was never called");
    assert!(there.insert_all(Vec::new()).unwrap().is_empty());
}

#[test]
fn what_was_given_up_before_keeps_the_others_from_nothing() {
    let space = space();
    let handler = Arc::new(Counting::default());
    let all = space.insert_all(prepared(&space, &handler)).unwrap();
    all[3].unregister().unwrap();
    let ends = Registration::unregister_all(&all);
    for (nth, end) in ends.into_iter().enumerate() {
        let range = page(9);
        let expected = match nth {
            3 => Err(UnregisterError::AlreadyUnregistered { range }),
            _ => Ok(Unregistered::Released),
        };
        assert_eq!(end, expected);
    }
    assert_eq!(handler.releases.load(SeqCst), MANY);
}

/// Gives all of them up in its first callback.
#[derive(Default)]
struct Resigning {
    all: Mutex<Vec<Registration>>,
    ends: Mutex<Vec<Result<Unregistered, UnregisterError>>>,
    released: AtomicUsize,
}

impl Notifier for Resigning {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let all = self.all.lock().unwrap();
        let ends = Registration::unregister_all(&all);
        *self.ends.lock().unwrap() = ends;
        Ok(op.idle())
    }

    fn release(&self) {
        self.released.fetch_add(1, SeqCst);
    }
}

#[test]
fn inside_a_callback_all_are_deferred_and_released_when_it_is_over() {
    let space = space();
    let handler = Arc::new(Resigning::default());
    let all = space.insert_all(prepared(&space, &handler)).unwrap();
    *handler.all.lock().unwrap() = all;
    shoot(&space, page(0));
    let ends = handler.ends.lock().unwrap();
    assert_eq!(ends.len(), MANY as usize);
    assert!(ends.iter().all(|one| *one == Ok(Unregistered::Deferred)));
    assert_eq!(handler.released.load(SeqCst), MANY as usize);
    handler.all.lock().unwrap().clear();
}

/// Inserts all of them in its first callback.
struct Hiring {
    space: SpacePin,
    all: Mutex<Vec<Prepared>>,
    hired: Mutex<Vec<Registration>>,
}

impl Notifier for Hiring {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let all = std::mem::take(&mut *self.all.lock().unwrap());
        let space = self.space.upgrade().unwrap();
        *self.hired.lock().unwrap() = space.insert_all(all).unwrap();
        Ok(op.idle())
    }
}

#[test]
fn what_is_inserted_inside_a_callback_is_found_as_a_whole_too() {
    let space = space();
    for _ in 0..60 {
        let handler = Arc::new(Counting::default());
        let hiring = Arc::new(Hiring {
            space: space.pin(),
            all: Mutex::new(prepared(&space, &handler)),
            hired: Mutex::default(),
        });
        // Beside all of them.
        let registration = space.register(page(3 * MANY), hiring.clone(), &[]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let start = Arc::new(Barrier::new(2));
        let walker = {
            let (space, handler, stop) = (space.clone(), handler.clone(), stop.clone());
            let start = start.clone();
            let all = Range::new(0u64, (3 * MANY) << 12).unwrap();
            thread::spawn(move || {
                let mut found = Vec::new();
                start.wait();
                while !stop.load(SeqCst) {
                    let before = handler.starts.load(SeqCst);
                    shoot(&space, all);
                    found.push(handler.starts.load(SeqCst) - before);
                }
                found
            })
        };
        start.wait();
        shoot(&space, page(3 * MANY));
        stop.store(true, SeqCst);
        let mut found = walker.join().unwrap();
        found.dedup();
        assert!(found.iter().all(|one| [0, MANY].contains(one)), "{found:?}");
        registration.unregister().unwrap();
        let hired = std::mem::take(&mut *hiring.hired.lock().unwrap());
        let ends = Registration::unregister_all(&hired);
        assert!(ends.iter().all(|one| *one == Ok(Unregistered::Released)));
    }
}

/// Its release says that it has begun, and waits until the others are released.
struct Waiting(Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>>);

impl Notifier for Waiting {
    fn release(&self) {
        if let Some((begun, others)) = self.0.lock().unwrap().take() {
            begun.send(()).unwrap();
            let waited = others.recv_timeout(Duration::from_secs(10));
            waited.expect("the others are not held up by this release");
        }
    }
}

#[test]
fn a_release_may_wait_until_another_thread_has_released_the_others() {
    for waits in 0..3 {
        let space = space();
        let (begins, begun) = mpsc::channel();
        let (done, over) = mpsc::channel();
        let mut ends = Some((begins, over));
        let many = (0..3)
            .map(|nth| {
                let waiting = if nth == waits { ends.take() } else { None };
                let handler = Arc::new(Waiting(Mutex::new(waiting)));
                space.prepare(page(nth), handler, &[]).unwrap()
            })
            .collect();
        let all = space.insert_all(many).unwrap();
        let other = {
            let space = space.clone();
            thread::spawn(move || {
                begun.recv().unwrap();
                let since = Instant::now();
                while space.stats().releases < 2 && since.elapsed() < Duration::from_secs(5) {
                    space.drain().unwrap();
                }
                done.send(()).unwrap();
                assert!(space.stats().releases >= 2, "they are held up");
            })
        };
        let ends = Registration::unregister_all(&all);
        assert!(ends.iter().all(|one| *one == Ok(Unregistered::Released)));
        other.join().unwrap();
    }
}
