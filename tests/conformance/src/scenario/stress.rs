//! Everything at once, from a seed: two threads have the device write, two change its memory.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{Map, MapError, PageSize, Range, Rights};

use crate::author::{Driver, Failure, Session};
use crate::lab::{Lab, PAGE, part, wait_for};
use crate::rule::Rule;

/// Pages that the threads meet on.
const PAGES: u64 = 64;
const TIME: Duration = Duration::from_millis(700);

pub(super) fn run<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let sessions = [lab.open(data)?, lab.open(data)?];
    let stop = AtomicBool::new(false);
    let seed: u64 = lab
        .rng
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .random();
    std::thread::scope(|scope| {
        for (nth, open) in (0..).zip(&sessions) {
            let (lab, stop) = (&lab, &stop);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed ^ nth);
                while !stop.load(Relaxed) {
                    if let Err(error) = work(&*open.session, &mut rng, data) {
                        lab.log
                            .find(Rule::Works, || format!("work beside changes: {error}"));
                        return;
                    }
                }
            });
        }
        for nth in 0..2 {
            let (lab, stop) = (&lab, &stop);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed ^ 0x100 ^ nth);
                // Each has half of it, so that none meets the other's holes.
                let own = part(data, nth * PAGES / 2..(nth + 1) * PAGES / 2);
                while !stop.load(Relaxed) {
                    if let Err(error) = change(lab, &mut rng, own) {
                        lab.log
                            .find(Rule::Works, || format!("a change beside work: {error}"));
                        return;
                    }
                }
            });
        }
        wait_for(TIME, || lab.log.has_found());
        stop.store(true, Relaxed);
    });
    lab.judge(Rule::Stale);
    let [first, second] = sessions;
    drop(first);
    lab.close(second);
    lab.finish(Rule::Stale);
    Ok(())
}

/// A single access, or work on a few pages.
fn work(session: &impl Session, rng: &mut SmallRng, data: Range) -> Result<(), Failure> {
    let page = rng.random_range(0..PAGES - 4);
    if rng.random_ratio(1, 4) {
        // Where it is not mapped as a whole it may be that it cannot be begun.
        let _ = session.start(part(data, page..page + 4));
        return session.settle();
    }
    let at = part(data, page..page + 1).start().get() + 8 * rng.random_range(0..512);
    session.write(at.into(), rng.random()).map(drop)
}

fn change<D: Driver>(lab: &Lab<D>, rng: &mut SmallRng, own: Range) -> Result<(), MapError> {
    let first = rng.random_range(0..PAGES / 2 - 4);
    let count = rng.random_range(1..=4);
    let some = part(own, first..first + count);
    let space = &lab.space;
    match rng.random_range(0..5) {
        0 => space.discard(some)?,
        1 => {
            space.protect(some, Rights::READ)?;
            space.protect(some, Rights::READ_WRITE)?;
        }
        2 => {
            let guard = space.lock_write()?;
            guard.unmap(some)?;
            guard.map(Map::anonymous(some.len() as u64).at(some.start()))?;
        }
        3 => match space.try_discard(some) {
            // Refused, by a lock that is held or by a handler.
            Ok(()) | Err(MapError::WouldBlock { .. } | MapError::Invalidate(_)) => {}
            Err(error) => return Err(error),
        },
        _ => {
            space.unmap(some)?;
            space.map(Map::anonymous(some.len() as u64).at(some.start()))?;
        }
    }
    Ok(())
}
