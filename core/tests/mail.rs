//! The three ways out that the mail of January 2008 on `mmu_notifier_release` discusses, each with real threads.
//!
//! The question was how a driver gives its notifier up while the exit of the address space may be releasing it. Either exit and
//! unregister exclude each other, and exit disarms what it finds; or `release` itself unregisters and drops what the driver
//! has left; or the driver keeps the space's memory, and unregisters when the space is gone.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, Weak};
use std::thread;

use shootdown::{
    AddressSpace, Cause, Drain, InsertError, InvalidateError, Notifier, Op, Outcome, Range,
    Registration, UnregisterError, Unregistered, WouldBlock,
};
use support::short;

const ROUNDS: usize = 300;

fn range() -> Range {
    Range::new(0x1000u64, 0x4000).unwrap()
}

/// One shootdown of the range, unless exit has begun, which shoots it down itself.
fn shoot_down(space: &AddressSpace) {
    match space.begin_invalidation(range(), Cause::External) {
        Ok(open) => open.end(Outcome::Changed).unwrap(),
        Err(InvalidateError::Exiting { range: whole }) => assert_eq!(whole, range()),
        Err(other) => panic!("{other}"),
    }
}

/// What a handler has seen of its life.
#[derive(Default)]
struct Life {
    starts: AtomicU64,
    ends: AtomicU64,
    releases: AtomicU64,
    /// A callback ran after `release` had begun.
    late: AtomicBool,
    /// `release` has returned.
    over: AtomicBool,
}

impl Life {
    fn start(&self) {
        self.starts.fetch_add(1, SeqCst);
        self.look();
    }

    fn end(&self) {
        self.look();
        self.ends.fetch_add(1, SeqCst);
    }

    fn look(&self) {
        if self.releases.load(SeqCst) > 0 {
            self.late.store(true, SeqCst);
        }
    }

    /// In a correct run: balanced, and released as often as it should.
    fn check(&self, releases: u64) {
        assert_eq!(self.releases.load(SeqCst), releases, "released once");
        assert_eq!(self.starts.load(SeqCst), self.ends.load(SeqCst), "balanced");
        assert!(!self.late.load(SeqCst), "no callback after release");
    }
}

impl Notifier for Life {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.start();
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        Life::end(self);
    }

    fn release(&self) {
        self.releases.fetch_add(1, SeqCst);
        thread::yield_now();
        self.over.store(true, SeqCst);
    }
}

#[test]
fn exit_excludes_register_and_unregister_by_a_lock_and_auto_disarms() {
    const DRIVERS: usize = 3;
    let (mut in_time, mut too_late) = (0, 0);
    for _ in 0..ROUNDS {
        let space = AddressSpace::without_memory(short());
        let kept_life = Arc::new(Life::default());
        let kept = space.register(range(), kept_life.clone(), &[]).unwrap();
        let together = Barrier::new(DRIVERS + 2);
        let exited = AtomicBool::new(false);
        thread::scope(|scope| {
            let (space, together, exited) = (&space, &together, &exited);
            let drivers: Vec<_> = (0..DRIVERS)
                .map(|_| {
                    scope.spawn(move || {
                        let (mut in_time, mut too_late) = (0, 0);
                        together.wait();
                        for _ in 0..4 {
                            let life = Arc::new(Life::default());
                            // Read first: if exit was over then, this must be refused.
                            let after_exit = exited.load(SeqCst);
                            match space.register(range(), life.clone(), &[]) {
                                Ok(registration) => {
                                    assert!(!after_exit, "no newcomer after exit (R7)");
                                    in_time += 1;
                                    let result = registration.unregister().unwrap();
                                    if result == Unregistered::Released {
                                        assert!(life.over.load(SeqCst), "release has returned");
                                    } else {
                                        // Exit won; it waits for this release before it returns.
                                        assert_eq!(result, Unregistered::AlreadyGone);
                                    }
                                    assert_eq!(
                                        registration.unregister(),
                                        Err(UnregisterError::AlreadyUnregistered {
                                            range: range()
                                        })
                                    );
                                    space.exit().unwrap();
                                    life.check(1);
                                }
                                Err(InsertError::Exiting { .. }) => {
                                    too_late += 1;
                                    life.check(0);
                                }
                                Err(other) => panic!("{other}"),
                            }
                        }
                        (in_time, too_late)
                    })
                })
                .collect();
            scope.spawn(move || {
                together.wait();
                shoot_down(space);
            });
            together.wait();
            space.exit().unwrap();
            exited.store(true, SeqCst);
            for driver in drivers {
                let (some_in_time, some_too_late) = driver.join().unwrap();
                in_time += some_in_time;
                too_late += some_too_late;
            }
        });
        assert_eq!(space.registrations(), 0);
        assert!(kept_life.over.load(SeqCst), "exit waits for release (R4)");
        let starts = kept_life.starts.load(SeqCst);
        shoot_down(&space);
        assert_eq!(
            kept_life.starts.load(SeqCst),
            starts,
            "exit has disarmed it"
        );
        assert_eq!(kept.unregister().unwrap(), Unregistered::AlreadyGone);
        kept_life.check(1);
    }
    assert!(in_time + too_late == ROUNDS * DRIVERS * 4);
    assert!(too_late > 0, "exit was met");
}

/// A driver's state: it holds its registration, and its handler holds it.
struct Driver {
    registration: Mutex<Option<Registration>>,
    dropped: Arc<AtomicU64>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, SeqCst);
    }
}

/// The handler whose `release` cleans up behind the driver: the last reference to it is the one in here.
struct Owner {
    driver: Mutex<Option<Arc<Driver>>>,
    life: Arc<Life>,
    /// What the unregister inside `release` said, if it was left to `release`.
    inside: Arc<Mutex<Option<Unregistered>>>,
}

impl Notifier for Owner {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.life.start();
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.life.end();
    }

    fn release(&self) {
        self.life.releases.fetch_add(1, SeqCst);
        let driver = self.driver.lock().unwrap().take().unwrap();
        let registration = driver.registration.lock().unwrap().take();
        if let Some(registration) = registration {
            *self.inside.lock().unwrap() = Some(registration.unregister().unwrap());
        }
        drop(driver);
    }
}

#[test]
fn release_itself_unregisters_and_drops_the_last_reference() {
    let mut left_to_release = 0;
    for round in 0..ROUNDS {
        let space = AddressSpace::without_memory(short());
        let dropped = Arc::new(AtomicU64::new(0));
        let driver = Arc::new(Driver {
            registration: Mutex::new(None),
            dropped: dropped.clone(),
        });
        let (life, inside) = (Arc::new(Life::default()), Arc::new(Mutex::new(None)));
        let owner = Owner {
            driver: Mutex::new(Some(driver.clone())),
            life: life.clone(),
            inside: inside.clone(),
        };
        let registration = space.register(range(), Arc::new(owner), &[]).unwrap();
        *driver.registration.lock().unwrap() = Some(registration);
        let closer: Weak<Driver> = Arc::downgrade(&driver);
        drop(driver);
        let together = Barrier::new(3);
        thread::scope(|scope| {
            let (space, together) = (&space, &together);
            scope.spawn(move || {
                together.wait();
                shoot_down(space);
            });
            scope.spawn(move || {
                together.wait();
                // Every other round the driver closes at the same time, if it comes first.
                let taken = (round % 2 == 0)
                    .then(|| closer.upgrade())
                    .flatten()
                    .and_then(|driver| driver.registration.lock().unwrap().take());
                if let Some(registration) = taken {
                    let result = registration.unregister().unwrap();
                    assert!(matches!(
                        result,
                        Unregistered::Released | Unregistered::AlreadyGone
                    ));
                }
            });
            together.wait();
            space.exit().unwrap();
        });
        let inside = inside.lock().unwrap().take();
        if let Some(inside) = inside {
            assert_eq!(inside, Unregistered::AlreadyGone, "it is over already");
            left_to_release += 1;
        }
        life.check(1);
        assert_eq!(dropped.load(SeqCst), 1, "the last reference went, once");
        assert_eq!(space.registrations(), 0);
    }
    assert!(left_to_release >= ROUNDS / 2, "the way out was taken");
}

#[test]
fn a_driver_pins_the_space_past_its_exit_and_unregisters_then() {
    for _ in 0..ROUNDS {
        let space = AddressSpace::without_memory(short());
        let life = Arc::new(Life::default());
        let together = Barrier::new(2);
        let pin = space.pin();
        let registration = space.register(range(), life.clone(), &[]).unwrap();
        thread::scope(|scope| {
            let (pin, together, life) = (&pin, &together, &life);
            scope.spawn(move || {
                together.wait();
                // An owner for a moment, or none any more: the last one to go runs the exit.
                if let Some(owner) = pin.upgrade() {
                    shoot_down(&owner);
                }
                // The owner is gone, but for the exit that may be running.
                while life.releases.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                assert!(pin.is_exiting());
                assert!(pin.upgrade().is_none(), "nobody comes back to life");
                assert_eq!(
                    registration.unregister().unwrap(),
                    Unregistered::AlreadyGone
                );
                assert_eq!(
                    registration.unregister(),
                    Err(UnregisterError::AlreadyUnregistered { range: range() })
                );
                // The last thing that keeps the space's memory, but for `pin`.
                drop(registration);
            });
            together.wait();
            drop(space);
        });
        life.check(1);
        drop(pin);
    }
}
