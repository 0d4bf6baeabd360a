//! Models: the races of the catalogue, over the code that ships, in every interleaving with few preemptions.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p shootdown --release --lib model`; with `--cfg planted` besides, and the name of a guard in
//! `SHOOTDOWN_PLANTED`, that guard is taken out, and the model has to fail.
//!
//! Each model drives whole address spaces through the public interface and asserts outcomes: how often a handler was
//! called and released, what was promised on return, what the device has installed. Outcomes are counted in [`Tally`]s, which
//! the checker sees, so that it tries both orders of what is counted; they are relaxed, so they order nothing for the
//! code under test. What `release` must be ordered after is checked by a cell of the checker's: an access to it
//! that is not ordered fails the model. A handler's panic is contained by the engine, so handlers note what is wrong and the
//! model asserts it.

mod litmus;
mod notes;
mod phases;
mod waits;

use std::sync::{Arc as StdArc, Mutex as StdMutex};
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use crate::active::Active;
use crate::addr::Range;
use crate::notifier::{Cause, Drain, Notifier, Op, Outcome, WouldBlock};
use crate::{
    AddressSpace, Deadlines, Fault, FaultError, InsertError, InvalidateError, NotifierLock,
    Refused, Registration, UnregisterError, Unregistered,
};

/// Longer than any model runs: time decides nothing.
const NEVER: Duration = Duration::from_secs(86_400);

fn space() -> AddressSpace {
    AddressSpace::without_memory(Deadlines {
        drain: NEVER,
        flush: NEVER,
        full_flush: NEVER,
        reset: NEVER,
        room: NEVER,
        callback: NEVER,
    })
}

fn page(nth: u64) -> Range {
    Range::new(nth << 12, 1 << 12).unwrap()
}

/// Explores `model` with at most `preemptions` switches away from a thread that could have gone on.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(model);
}

/// A count. A read-modify-write sees the latest value; relaxed, it orders nothing.
struct Tally(AtomicUsize);

impl Tally {
    fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn get(&self) -> usize {
        self.0.fetch_add(0, Ordering::Relaxed)
    }
}

/// What a callback does besides being counted.
type Act = Box<dyn Fn() + Send + Sync>;

/// A handler that counts.
struct Probe {
    quiesced: Tally,
    released: Tally,
    /// Callbacks that ran after a model had been told that none would.
    late: Tally,
    /// The model has been told so.
    over: Tally,
    /// Read by callbacks, written by `release`: which is after all of them, or the checker objects.
    resources: UnsafeCell<u32>,
    on_quiesce: Act,
    on_release: Act,
}

// SAFETY: `resources` is the checker's cell: it verifies that no access races, which is what the models are for.
unsafe impl Sync for Probe {}

impl Probe {
    fn new() -> StdArc<Self> {
        Self::acting(|| {}, || {})
    }

    fn acting(
        on_quiesce: impl Fn() + Send + Sync + 'static,
        on_release: impl Fn() + Send + Sync + 'static,
    ) -> StdArc<Self> {
        StdArc::new(Self {
            quiesced: Tally::new(),
            released: Tally::new(),
            late: Tally::new(),
            over: Tally::new(),
            resources: UnsafeCell::new(0),
            on_quiesce: Box::new(on_quiesce),
            on_release: Box::new(on_release),
        })
    }

    fn callback(&self) {
        if self.over.get() > 0 {
            self.late.add();
        }
        // SAFETY: only the checker's bookkeeping; nothing is read through the pointer.
        self.resources.with(|_| ());
    }

    /// The model has been promised that no callback runs or will run.
    fn is_over(&self) {
        self.over.add();
    }

    /// Ordered after the release, and the only one.
    fn assert_released_once(&self) {
        assert_eq!(self.released.get(), 1, "release runs exactly once");
        self.resources.with(|_| ());
        assert_eq!(
            self.late.get(),
            0,
            "a callback came after the promise that none would"
        );
    }
}

impl Notifier for Probe {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.callback();
        self.quiesced.add();
        (self.on_quiesce)();
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.callback();
    }

    fn release(&self) {
        if self.over.get() > 0 {
            self.late.add();
        }
        self.resources.with_mut(|_| ());
        (self.on_release)();
        self.released.add();
    }
}

/// A place where a handler finds a registration that is made after it.
#[derive(Clone, Default)]
struct Held(StdArc<StdMutex<Option<Registration>>>);

impl Held {
    fn put(&self, registration: Registration) {
        *self.0.lock().unwrap() = Some(registration);
    }

    fn take(&self) -> Option<Registration> {
        self.0.lock().unwrap().take()
    }

    /// Unregisters it and drops the handle, once.
    fn unregister(&self, expected: &[Unregistered]) -> Option<Unregistered> {
        let registration = self.take()?;
        let result = registration.unregister().unwrap();
        assert!(expected.contains(&result), "{result:?}");
        Some(result)
    }
}

/// Unless exit has begun, which shoots everything down itself.
fn invalidate(space: &AddressSpace, range: Range) {
    match space.begin_invalidation(range, Cause::External) {
        Ok(open) => open.end(Outcome::Changed).unwrap(),
        Err(InvalidateError::Exiting { .. }) => {}
        Err(other) => panic!("{other}"),
    }
}

/// A thread that exits, on return from which `probe` has been released.
fn exiting(space: &AddressSpace, probe: &StdArc<Probe>) -> thread::JoinHandle<()> {
    let (space, probe) = (space.clone(), probe.clone());
    thread::spawn(move || {
        space.exit().unwrap();
        probe.assert_released_once();
    })
}

/// R1-R4, and the first way out of the mail: both give it up, one of them releases, and each returns after the release.
#[test]
fn exit_and_unregister_release_once_and_return_after_it() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let exiting = exiting(&space, &probe);
        let result = registration.unregister().unwrap();
        assert!(matches!(
            result,
            Unregistered::Released | Unregistered::AlreadyGone
        ));
        if result == Unregistered::Released {
            probe.assert_released_once();
        }
        exiting.join().unwrap();
        probe.assert_released_once();
    });
}

/// R4: of two exits the second returns when the first is over.
#[test]
fn two_exits_return_after_the_release() {
    check(2, || {
        let (space, probe) = (space(), Probe::new());
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let exiting = exiting(&space, &probe);
        space.exit().unwrap();
        probe.assert_released_once();
        exiting.join().unwrap();
        drop(registration);
    });
}

/// What `unregister` promises for each of its outcomes: no callback runs or will run.
#[test]
fn unregister_that_lost_to_exit_returns_after_the_last_callback() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let exiting = {
            let space = space.clone();
            thread::spawn(move || space.exit().unwrap())
        };
        registration.unregister().unwrap();
        probe.is_over();
        exiting.join().unwrap();
        probe.assert_released_once();
    });
}

/// The same beside an invalidation: neither is called after it has been given up, and `release` is after its `end`.
#[test]
fn unregister_returns_after_the_callbacks_of_an_invalidation() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let invalidating = {
            let space = space.clone();
            thread::spawn(move || invalidate(&space, page(1)))
        };
        assert_eq!(registration.unregister(), Ok(Unregistered::Released));
        probe.is_over();
        probe.assert_released_once();
        invalidating.join().unwrap();
        probe.assert_released_once();
    });
}

/// R5: who drops a registration that is in use leaves its release to the callbacks.
#[test]
fn a_drop_beside_an_invalidation_releases_after_its_callbacks() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let invalidating = {
            let space = space.clone();
            thread::spawn(move || invalidate(&space, page(1)))
        };
        drop(registration);
        invalidating.join().unwrap();
        probe.assert_released_once();
    });
}

/// R7 and the mail's first: a newcomer is refused by name, always so once exit has returned, or exit releases it.
#[test]
fn a_newcomer_to_an_exiting_space_is_refused_or_released() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let exited = StdArc::new(Tally::new());
        let exiting = {
            let (space, exited) = (space.clone(), exited.clone());
            thread::spawn(move || {
                space.exit().unwrap();
                exited.add();
            })
        };
        let after = exited.get() > 0;
        let result = space.register(page(1), probe.clone(), &[]);
        assert!(result.is_err() || !after, "a newcomer after exit");
        exiting.join().unwrap();
        match &result {
            Ok(registration) => {
                probe.assert_released_once();
                assert_eq!(registration.unregister(), Ok(Unregistered::AlreadyGone));
            }
            Err(InsertError::Exiting { range }) => {
                assert_eq!(*range, page(1));
                assert_eq!(probe.quiesced.get() + probe.released.get(), 0);
            }
            Err(other) => panic!("{other}"),
        }
    });
}

/// An insertion inside a callback, beside exit: refused by name, or visible when the thread is out of its callbacks, and released
/// once, by exit at the latest.
#[test]
fn an_insertion_that_is_put_off_beside_exit_is_refused_or_released() {
    check(2, || {
        let (space, newcomer) = (space(), Probe::new());
        let prepared = space.prepare(page(2), newcomer.clone(), &[]).unwrap();
        let prepared = StdArc::new(StdMutex::new(Some(prepared)));
        let inserted = StdArc::new(StdMutex::new(None));
        let probe = {
            let (prepared, inserted) = (prepared.clone(), inserted.clone());
            Probe::acting(
                move || {
                    let prepared = prepared.lock().unwrap().take();
                    if let Some(prepared) = prepared {
                        *inserted.lock().unwrap() = Some(prepared.insert());
                    }
                },
                || {},
            )
        };
        let _first = space.register(page(1), probe, &[]).unwrap();
        let exiting = {
            let space = space.clone();
            thread::spawn(move || space.exit().unwrap())
        };
        invalidate(&space, page(1));
        exiting.join().unwrap();
        let inserted = inserted.lock().unwrap().take();
        match inserted.expect("exit or the invalidation has called it") {
            Ok(registration) => {
                newcomer.assert_released_once();
                assert_eq!(registration.unregister(), Ok(Unregistered::AlreadyGone));
            }
            Err(InsertError::Exiting { .. }) => assert_eq!(newcomer.released.get(), 0),
            Err(other) => panic!("{other}"),
        }
        drop(prepared);
    });
}

/// R8 for an insertion that is put off, here by an invalidation of something else: until it is visible no invalidation finds it, so its
/// faults wait; afterwards it is called.
#[test]
fn a_fault_on_an_insertion_that_is_put_off_installs_nothing_stale() {
    check(2, || {
        let (space, device) = (space(), Device::new());
        let prepared = space.prepare(page(1), device.clone(), &[]).unwrap();
        let open = space.begin_invalidation(page(7), Cause::External).unwrap();
        let registration = StdArc::new(prepared.insert().unwrap());
        let other = {
            let (space, device) = (space.clone(), device.clone());
            let registration = registration.clone();
            thread::spawn(move || {
                device.fault(&registration);
                device.change_page(&space);
            })
        };
        open.end(Outcome::Changed).unwrap();
        other.join().unwrap();
        device.assert_fresh();
    });
}

/// The mail's first, whole: exit excludes register and unregister, and what it disarmed is disarmed for good.
#[test]
fn register_and_unregister_beside_exit_leave_nothing_armed() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let exiting = {
            let space = space.clone();
            thread::spawn(move || space.exit().unwrap())
        };
        if let Ok(registration) = space.register(page(1), probe.clone(), &[]) {
            registration.unregister().unwrap();
            exiting.join().unwrap();
            probe.assert_released_once();
        } else {
            exiting.join().unwrap();
            assert_eq!(probe.released.get(), 0);
        }
        assert_eq!(space.registrations(), 0);
    });
}

/// The mail's second: `release` gives up another registration and drops the last reference to its own.
#[test]
fn release_may_unregister_another_and_drop_the_last_reference() {
    check(2, || {
        let space = space();
        let (own, other) = (Held::default(), Held::default());
        let second = Probe::new();
        let first = {
            let (own, other) = (own.clone(), other.clone());
            Probe::acting(
                || {},
                move || {
                    let found = [Unregistered::Deferred, Unregistered::AlreadyGone];
                    other.unregister(&found);
                    drop(own.take());
                },
            )
        };
        own.put(space.register(page(1), first.clone(), &[]).unwrap());
        other.put(space.register(page(2), second.clone(), &[]).unwrap());
        let exiting = {
            let space = space.clone();
            thread::spawn(move || space.exit().unwrap())
        };
        if let Some(own) = own.take() {
            own.unregister().unwrap();
        }
        exiting.join().unwrap();
        first.assert_released_once();
        second.assert_released_once();
        assert!(own.take().is_none() && other.take().is_none());
    });
}

/// The mail's third: a pin and a registration outlive the exit of the last owner.
#[test]
fn a_pin_past_exit_finds_nothing_left_to_do() {
    check(3, || {
        let (space, probe) = (space(), Probe::new());
        let pin = space.pin();
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let dropping = {
            let probe = probe.clone();
            thread::spawn(move || {
                drop(space);
                probe.released.get()
            })
        };
        let owner = pin.upgrade();
        let upgraded = owner.is_some();
        drop(owner);
        let seen = dropping.join().unwrap();
        assert!(upgraded || seen == 1, "the last owner was the other thread");
        probe.assert_released_once();
        assert!(pin.is_exiting() && pin.upgrade().is_none());
        assert_eq!(registration.unregister(), Ok(Unregistered::AlreadyGone));
    });
}

/// What a pin promises: no new owner once exit has begun.
#[test]
fn a_pin_is_not_upgraded_once_exit_has_begun() {
    check(3, || {
        let space = space();
        let pin = space.pin();
        space.exit().unwrap();
        assert!(pin.is_exiting());
        assert!(pin.upgrade().is_none());
    });
}

/// R11: from its own callback it is put off, beside an invalidation and an exit, and nobody waits for itself.
#[test]
fn unregister_in_the_own_callback_is_put_off_and_released_once() {
    check(2, || {
        let (space, held) = (space(), Held::default());
        let probe = {
            let held = held.clone();
            Probe::acting(
                move || {
                    let found = [Unregistered::Deferred, Unregistered::AlreadyGone];
                    held.unregister(&found);
                },
                || {},
            )
        };
        held.put(space.register(page(1), probe.clone(), &[]).unwrap());
        let invalidating = {
            let space = space.clone();
            thread::spawn(move || invalidate(&space, page(1)))
        };
        space.exit().unwrap();
        probe.assert_released_once();
        invalidating.join().unwrap();
        probe.assert_released_once();
    });
}

/// R12: each gives up the other while it runs; no wait, no ring.
#[test]
fn two_handlers_may_unregister_each_other() {
    check(3, || {
        let space = space();
        let (first, second) = (Held::default(), Held::default());
        let naming = |other: &Held| {
            let other = other.clone();
            Probe::acting(
                move || {
                    other.unregister(&[Unregistered::Deferred]);
                },
                || {},
            )
        };
        let probes = [naming(&second), naming(&first)];
        first.put(space.register(page(1), probes[0].clone(), &[]).unwrap());
        second.put(space.register(page(2), probes[1].clone(), &[]).unwrap());
        let invalidating = {
            let space = space.clone();
            thread::spawn(move || invalidate(&space, page(1)))
        };
        invalidate(&space, page(2));
        invalidating.join().unwrap();
        space.exit().unwrap();
        probes.iter().for_each(|probe| probe.assert_released_once());
        // One that was given up before it was called has not given up the other: the handles end here.
        drop((first.take(), second.take()));
    });
}

/// R31: joins or makes anew, and each that was made is released once.
#[test]
fn a_get_beside_the_last_put_joins_or_makes_anew() {
    check(3, || {
        let space = space();
        let probes = [Probe::new(), Probe::new()];
        let made = StdArc::new(Tally::new());
        let make = |probe: &StdArc<Probe>| {
            let (made, probe) = (made.clone(), probe.clone());
            move || {
                made.add();
                (page(1), probe as StdArc<dyn Notifier>, Vec::new())
            }
        };
        let first = space.share(7, make(&probes[0])).unwrap();
        let putting = thread::spawn(move || first.put().unwrap());
        let second = space.share(7, make(&probes[1])).unwrap();
        assert!(second.begin(page(1), NEVER).is_ok(), "what was got is live");
        let (mine, other) = (second.put().unwrap(), putting.join().unwrap());
        let released = |one| usize::from(one == Unregistered::Released);
        assert_eq!(released(mine) + released(other), made.get());
        probes[0].assert_released_once();
        assert_eq!(probes[1].released.get(), made.get() - 1);
    });
}

/// Completions put off by two threads at once: each is run by one of them, without a drain.
#[test]
fn no_completion_is_lost_between_two_threads() {
    check(3, || {
        let space = space();
        let probes = [Probe::new(), Probe::new(), Probe::new()];
        let [one, two, three] = [0, 1, 2].map(|nth| {
            let range = page(nth as u64);
            space.register(range, probes[nth].clone(), &[]).unwrap()
        });
        let dropping = thread::spawn(move || drop(one));
        two.unregister().unwrap();
        drop(three);
        dropping.join().unwrap();
        probes.iter().for_each(|probe| probe.assert_released_once());
    });
}

/// A device with one entry, under the lock that `quiesce` takes, and the page behind it.
struct Device {
    installed: NotifierLock<Option<usize>>,
    page: Tally,
}

impl Device {
    fn new() -> StdArc<Self> {
        StdArc::new(Self {
            installed: NotifierLock::new(None),
            page: Tally::new(),
        })
    }

    /// The driver's fault path.
    fn fault(&self, registration: &Registration) {
        let mut fault: Fault<'_> = registration.begin(page(1), NEVER).unwrap();
        loop {
            let found = self.page.get();
            let mut installed = self.installed.lock();
            if !fault.retry(&installed) {
                *installed = Some(found);
                return;
            }
            drop(installed);
            fault.again().unwrap();
        }
    }

    fn change_page(&self, space: &AddressSpace) {
        let open = space.begin_invalidation(page(1), Cause::External).unwrap();
        let stale = self.installed.lock().take();
        self.page.add();
        open.end(Outcome::Changed).unwrap();
        assert_eq!(stale, None, "an entry was there when the page changed");
    }

    fn assert_fresh(&self) {
        let (installed, page) = (*self.installed.lock(), self.page.get());
        assert!(
            installed.is_none_or(|found| found == page),
            "the device uses version {installed:?} of a page that is at {page}"
        );
    }
}

impl Notifier for Device {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        *self.installed.lock_for(op)? = None;
        Ok(op.idle())
    }
}

/// R9: whatever a fault installs beside an invalidation is what the page is afterwards.
#[test]
fn a_fault_beside_an_invalidation_installs_nothing_stale() {
    check(3, || {
        let (space, device) = (space(), Device::new());
        let registration = space.register(page(1), device.clone(), &[]).unwrap();
        let changing = {
            let (space, device) = (space.clone(), device.clone());
            thread::spawn(move || device.change_page(&space))
        };
        device.fault(&registration);
        changing.join().unwrap();
        device.assert_fresh();
    });
}

/// R8: a newcomer is called, or its fault waits for the invalidation that did not find it.
#[test]
fn a_newcomer_to_an_active_range_installs_nothing_stale() {
    check(3, || {
        let (space, device) = (space(), Device::new());
        let changing = {
            let (space, device) = (space.clone(), device.clone());
            thread::spawn(move || device.change_page(&space))
        };
        let registration = space.register(page(1), device.clone(), &[]).unwrap();
        device.fault(&registration);
        changing.join().unwrap();
        device.assert_fresh();
    });
}

/// R8, the claim by itself, whatever the index that is walked after it does for order: one of the two sees the other.
#[test]
fn a_claim_and_a_newcomer_do_not_miss_each_other() {
    check(3, || {
        let active = StdArc::new(Active::new());
        let index = StdArc::new(AtomicUsize::new(0));
        let claiming = {
            let (active, index) = (active.clone(), index.clone());
            thread::spawn(move || {
                active.claim(page(1)).unwrap();
                index.load(Ordering::Acquire) == 1
            })
        };
        index.store(1, Ordering::Release);
        let newcomer_sees = active.may_have_missed(page(1));
        let walk_sees = claiming.join().unwrap();
        assert!(newcomer_sees || walk_sees, "they missed each other");
    });
}

/// A fault does not outlive its registration: it ends with a typed error, also when it waits.
#[test]
fn a_fault_beside_exit_is_told_that_the_registration_is_over() {
    check(3, || {
        let (space, device) = (space(), Device::new());
        let registration = space.register(page(1), device.clone(), &[]).unwrap();
        let exiting = {
            let space = space.clone();
            thread::spawn(move || space.exit().unwrap())
        };
        match registration.begin(page(1), NEVER) {
            Ok(fault) => {
                let installed = device.installed.lock();
                fault.retry(&installed);
            }
            Err(FaultError::Gone { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        exiting.join().unwrap();
        assert!(matches!(
            registration.begin(page(1), NEVER),
            Err(FaultError::Gone { .. })
        ));
    });
}

/// R32: who holds the map lock waits for a callback, the callback for the driver's lock, and its holder is told no.
#[test]
fn the_holder_of_a_notifier_lock_cannot_close_a_ring() {
    check(1, || {
        let (space, device) = (space(), Device::new());
        let registration = StdArc::new(space.register(page(1), device.clone(), &[]).unwrap());
        let invalidating = {
            let (space, device) = (space.clone(), device.clone());
            thread::spawn(move || device.change_page(&space))
        };
        let driver = {
            let (space, registration) = (space.clone(), registration.clone());
            thread::spawn(move || {
                let _held = device.installed.lock();
                assert!(matches!(
                    space.lock_write(),
                    Err(Refused::NotifierLockHeld { .. })
                ));
                assert!(matches!(
                    registration.unregister(),
                    Err(UnregisterError::Refused(Refused::NotifierLockHeld { .. }))
                ));
            })
        };
        let map = space.lock_write().unwrap();
        assert_eq!(registration.unregister(), Ok(Unregistered::Quiet));
        drop(map);
        driver.join().unwrap();
        invalidating.join().unwrap();
    });
}
