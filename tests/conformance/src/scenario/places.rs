//! How a session ends: with its segment, by being given up in each place, with its space.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shootdown::{Drain, Map, Notifier, Op, PageSize, Place, Range, WouldBlock};

use crate::author::{Driver, Failure, Session};
use crate::lab::{Lab, PAGE, left_over, part};
use crate::rule::Rule;

const PAGES: u64 = 16;
/// How long a device is given to do what it should not.
const GOES_ON: Duration = Duration::from_millis(3);

/// Its memory goes and comes back, as somebody else's: whatever still works on it is found out.
fn reuse<D: Driver>(lab: &Lab<D>, data: Range, rule: Rule, when: &str) -> Result<(), Failure> {
    lab.nothing_reaches(data, rule, when);
    lab.space.unmap(data)?;
    lab.space
        .map(Map::anonymous(data.len() as u64).at(data.start()))?;
    std::thread::sleep(GOES_ON);
    lab.judge(rule);
    lab.space.unmap(data)?;
    Ok(())
}

/// The segment is unmapped by its addresses, whole or in part, with and without the map lock held.
pub(super) fn segment<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    for (whole, locked) in [(true, false), (false, false), (true, true), (false, true)] {
        let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
        let open = lab.open(data)?;
        let Some(own) = open.session.segment() else {
            lab.log.skip("its sessions are no segments");
            break;
        };
        lab.touch(&open.session, data);
        open.session.start(data)?;
        let gone = if whole { own } else { part(own, 0..1) };
        let held = if locked {
            ", with the map lock held"
        } else {
            ""
        };
        lab.log
            .step(|| format!("unmap of {gone}, of the segment {own}, with work in flight{held}"));
        if locked {
            lab.space.lock_write()?.unmap(gone)?;
        } else {
            lab.space.unmap(gone)?;
        }
        let when = "after its segment had been unmapped";
        lab.nothing_reaches(data, Rule::Unload, when);
        drop(open);
        reuse(&lab, data, Rule::Unload, when)?;
        if lab.log.has_found() {
            break;
        }
    }
    lab.finish(Rule::Unload);
    Ok(())
}

/// Drops what it holds, in a callback or in its release.
struct Holds<T> {
    held: Mutex<Option<T>>,
    in_callback: bool,
}

impl<T> Holds<T> {
    fn drop_it(&self) {
        let held = self
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // A heap that the application cannot have locked: it is the kit's own callback.
        crate::alloc::outside(|| drop(held));
    }
}

impl<T: Send + 'static> Notifier for Holds<T> {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if self.in_callback {
            self.drop_it();
        }
        Ok(op.idle())
    }

    fn release(&self) {
        self.drop_it();
    }
}

pub(super) fn each<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let own_page = lab.map(PAGE, PageSize::FourKiB)?;
    for place in Place::ALL {
        let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
        let before = lab.space.registrations();
        let session = lab.driver.open(&lab.space, data)?;
        let rule = left_over(&session);
        lab.touch(&session, data);
        session.start(data)?;
        let name = match place {
            Place::Plain => "an ordinary thread",
            Place::MapLockHeld => "a thread that holds the map lock",
            Place::InsideOwnCallback => "its own callback",
            Place::InsideOtherCallback => "another handler's callback",
            _ => "another handler's release",
        };
        lab.log
            .step(|| format!("with work in flight the session is given up in {name}"));
        match place {
            Place::Plain => drop(session),
            Place::MapLockHeld => {
                let guard = lab.space.lock_write()?;
                drop(session);
                drop(guard);
            }
            Place::InsideOwnCallback => {
                if !session.give_up_in_callback() {
                    lab.log
                        .skip("the driver does not give sessions up inside its own callbacks");
                }
                lab.space.discard(part(data, 0..1))?;
                drop(session);
            }
            _ => {
                let in_callback = place == Place::InsideOtherCallback;
                let holds = Arc::new(Holds {
                    held: Mutex::new(Some(session)),
                    in_callback,
                });
                let registration = lab.space.register(own_page, holds, &[])?;
                if in_callback {
                    lab.space.discard(own_page)?;
                }
                registration.unregister()?;
            }
        }
        lab.space.drain()?;
        let left = lab.space.registrations().saturating_sub(before);
        if left > 0 {
            lab.log.find(Rule::Release, || {
                format!("the session was given up in {name}, and {left} of its registrations are still there")
            });
        }
        reuse(
            &lab,
            data,
            rule,
            &format!("after the session had been given up in {name}"),
        )?;
        if lab.log.has_found() {
            break;
        }
    }
    lab.finish(Rule::Release);
    Ok(())
}

pub(super) fn exit<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    lab.touch(&open.session, data);
    open.session.start(data)?;
    let rule = match left_over(&*open.session) {
        Rule::Release => Rule::Exit,
        of_segments => of_segments,
    };
    lab.log.step(|| "exit with work in flight".to_owned());
    lab.memory.exits(rule);
    lab.space.exit()?;
    std::thread::sleep(GOES_ON);
    lab.nothing_reaches(data, rule, "after the space had exited");
    lab.judge(Rule::Exit);
    if open
        .session
        .write(data.start(), 1)
        .is_ok_and(|said| said == crate::author::Access::Done)
    {
        lab.log.find(Rule::Exit, || {
            "the device wrote to a space that has exited".to_owned()
        });
    }
    lab.close(open);
    lab.finish(Rule::Exit);
    Ok(())
}
