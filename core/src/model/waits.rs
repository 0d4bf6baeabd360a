//! What may be waited for where: a ring of waits is a deadlock, which the checker reports by itself.

use std::sync::Arc as StdArc;
use std::sync::Mutex as StdMutex;

use loom::thread;

use super::{Held, NEVER, Probe, Tally, check, invalidate, page, space};
use crate::notifier::{Cause, Outcome};
use crate::{Refused, Registration, Unregistered};

/// R17: a callback that wants the map lock, whose holder waits for that callback, is told no.
#[test]
fn the_map_lock_is_refused_in_a_callback() {
    check(2, || {
        let space = space();
        let refused = StdArc::new(Tally::new());
        let probe = {
            let (pin, refused) = (space.pin(), refused.clone());
            Probe::acting(
                move || {
                    let owner = pin.upgrade().expect("the model has an owner");
                    if matches!(owner.lock_write(), Err(Refused::InCallback { .. })) {
                        refused.add();
                    }
                },
                || {},
            )
        };
        let registration = space.register(page(1), probe.clone(), &[]).unwrap();
        let invalidating = {
            let space = space.clone();
            thread::spawn(move || invalidate(&space, page(1)))
        };
        let map = space.lock_write().unwrap();
        assert_eq!(registration.unregister(), Ok(Unregistered::Quiet));
        drop(map);
        invalidating.join().unwrap();
        assert_eq!(refused.get(), probe.quiesced.get());
        probe.assert_released_once();
    });
}

/// R24: each callback asks for the other registration's callbacks to end, and does not wait for that.
#[test]
fn handlers_that_synchronize_each_other_do_not_wait() {
    check(2, || {
        let space = space();
        let places: [Other; 2] = Default::default();
        let naming = |other: &Other| {
            let other = other.clone();
            Probe::acting(
                move || {
                    let other = other.lock().unwrap().clone();
                    if let Some(other) = other {
                        // What it says is a cell of the table; here it must not wait.
                        let _ = other.synchronize().unwrap();
                    }
                },
                || {},
            )
        };
        let probes = [naming(&places[1]), naming(&places[0])];
        for (nth, place) in places.iter().enumerate() {
            let registration = space
                .register(page(nth as u64), probes[nth].clone(), &[])
                .unwrap();
            *place.lock().unwrap() = Some(StdArc::new(registration));
        }
        let invalidating = {
            let space = space.clone();
            thread::spawn(move || invalidate(&space, page(1)))
        };
        invalidate(&space, page(0));
        invalidating.join().unwrap();
        places
            .iter()
            .for_each(|one| drop(one.lock().unwrap().take()));
        probes.iter().for_each(|probe| probe.assert_released_once());
    });
}

/// Where a handler finds the registration that it waits for.
type Other = StdArc<StdMutex<Option<StdArc<Registration>>>>;

/// R21: whoever waits for a callback to end is woken by the end of anything else, and goes on waiting.
#[test]
fn a_wait_outlasts_the_end_of_something_else() {
    check(2, || {
        let (space, probe, held) = (space(), Probe::new(), Held::default());
        held.put(space.register(page(1), probe.clone(), &[]).unwrap());
        let promised = StdArc::new(Tally::new());
        let invalidating = {
            let (space, probe, promised) = (space.clone(), probe.clone(), promised.clone());
            thread::spawn(move || {
                let open = space.begin_invalidation(page(1), Cause::External).unwrap();
                let called = probe.quiesced.get() > 0;
                // Ends, and is nothing of what is waited for.
                let other = space.clone();
                let other = thread::spawn(move || invalidate(&other, page(9)));
                other.join().unwrap();
                let early = called && promised.get() > 0;
                open.end(Outcome::Changed).unwrap();
                early
            })
        };
        let map = space.lock_write().unwrap();
        held.unregister(&[Unregistered::Quiet]);
        promised.add();
        drop(map);
        assert!(
            !invalidating.join().unwrap(),
            "promised that no callback will run, with `end` to come"
        );
        probe.assert_released_once();
    });
}

/// A fault waits for what overlaps its entry, and for nothing else: an invalidation of something else may be long, and is not taken
/// for one that overlaps because it had yet to say its range when the fault looked.
#[test]
fn a_fault_does_not_wait_for_what_is_elsewhere() {
    check(3, || {
        let space = space();
        let begun = StdArc::new((loom::sync::Mutex::new(false), loom::sync::Condvar::new()));
        let elsewhere = {
            let (space, begun) = (space.clone(), begun.clone());
            thread::spawn(move || {
                let open = space.begin_invalidation(page(9), Cause::External).unwrap();
                let mut fault = begun.0.lock().unwrap();
                while !*fault {
                    fault = begun.1.wait(fault).unwrap();
                }
                drop(fault);
                open.end(Outcome::Changed).unwrap();
            })
        };
        let registration = space.register(page(1), Probe::new(), &[]).unwrap();
        registration.begin(page(1), NEVER).unwrap();
        *begun.0.lock().unwrap() = true;
        begun.1.notify_all();
        elsewhere.join().unwrap();
    });
}

/// R4: of what is given up together one is in its release, which waits for the other's: that is run by whoever waits meanwhile.
#[test]
fn what_is_given_up_together_is_released_by_whoever_waits() {
    check(2, || {
        let space = space();
        let over = StdArc::new((loom::sync::Mutex::new(false), loom::sync::Condvar::new()));
        let waiting = {
            let over = over.clone();
            Probe::acting(
                || {},
                move || {
                    let mut is_over = over.0.lock().unwrap();
                    while !*is_over {
                        is_over = over.1.wait(is_over).unwrap();
                    }
                },
            )
        };
        let other = Probe::acting(
            || {},
            move || {
                *over.0.lock().unwrap() = true;
                over.1.notify_all();
            },
        );
        let prepare = |nth, probe: &StdArc<Probe>| space.prepare(page(nth), probe.clone(), &[]);
        let both = vec![prepare(1, &other).unwrap(), prepare(2, &waiting).unwrap()];
        let both = space.insert_all(both).unwrap();
        let exiting = {
            let space = space.clone();
            thread::spawn(move || space.exit().unwrap())
        };
        for end in Registration::unregister_all(&both) {
            assert!(matches!(
                end,
                Ok(Unregistered::Released | Unregistered::AlreadyGone)
            ));
        }
        exiting.join().unwrap();
        other.assert_released_once();
        waiting.assert_released_once();
    });
}
