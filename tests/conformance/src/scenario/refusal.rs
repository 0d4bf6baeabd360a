//! Non-blocking operations, refused by another's handler or by the driver's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use shootdown::{
    Drain, InvalidateError, Map, MapError, Notifier, Op, PageSize, Range, Rights, WouldBlock,
};

use crate::author::{Access, Driver, Failure, Hardware, Session};
use crate::lab::{Beside, Lab, PAGE, part};
use crate::rule::Rule;

/// Refuses whatever it may.
struct Refuses;

impl Notifier for Refuses {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if op.may_block() {
            Ok(op.idle())
        } else {
            Err(WouldBlock)
        }
    }
}

pub(super) fn by_others<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(16 * PAGE, PageSize::FourKiB)?;
    for before in [true, false] {
        let refuses = || lab.space.register(data, Arc::new(Refuses), &[]);
        let early = before.then(refuses).transpose()?;
        let open = lab.open(data)?;
        let late = (!before).then(refuses).transpose()?;
        let hole = part(data, 15..16);
        lab.space.unmap(hole)?;
        for nth in 0..4 {
            let page = part(data, nth..nth + 1);
            lab.touch(&open.session, page);
            let (what, result) = match nth {
                0 => ("unmap", lab.space.try_unmap(page)),
                1 => ("discard", lab.space.try_discard(page)),
                2 => ("protect", lab.space.try_protect(page, Rights::READ)),
                _ => ("remap", lab.space.try_remap(page, hole.start()).map(|_| ())),
            };
            lab.log.step(|| format!("a non-blocking {what} of {page} is refused by another handler, called {} the driver's", if before { "before" } else { "after" }));
            match result {
                Err(MapError::Invalidate(InvalidateError::WouldBlock { .. })) => {}
                other => lab.log.find(Rule::Refuse, || {
                    format!("a {what} that a handler refused came to {other:?}")
                }),
            }
            // What was there is there, and the device works on it.
            let kept = page.start().get() | 1;
            // SAFETY: the page is mapped: the operation was refused. Nobody else changes it.
            let found = unsafe { (page.start().get() as *const u64).read_volatile() };
            if found != kept {
                lab.log.find(Rule::Balance, || {
                    format!("a refused {what} left {found:#x} in memory, not {kept:#x}")
                });
            }
            lab.expect(
                &open.session,
                page.start(),
                nth + 17,
                Access::Done,
                Rule::Balance,
            );
            if lab.log.has_found() {
                break;
            }
            lab.space.discard(page)?;
            lab.expect(
                &open.session,
                page.start(),
                nth + 18,
                Access::Done,
                Rule::Balance,
            );
        }
        lab.close(open);
        drop((early, late));
        lab.space.map(Map::anonymous(PAGE).at(hole.start()))?;
        if lab.log.has_found() {
            break;
        }
    }
    lab.finish(Rule::Balance);
    Ok(())
}

/// While the driver installs an entry, with its lock held, its page is discarded by an operation that may not wait.
pub(super) fn by_the_driver<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(16 * PAGE, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    for nth in 0..4 {
        let page = part(data, nth..nth + 1);
        let (space, log, times) = (lab.space.clone(), Arc::clone(&lab.log), AtomicU32::new(0));
        let threads = Arc::new(Beside::default());
        let own = Arc::clone(&threads);
        let said = Arc::new(AtomicBool::new(false));
        let can = lab.hardware.on_install(Some(Arc::new(move |entry: Range| {
            if !entry.overlaps(page) || times.fetch_add(1, SeqCst) > 0 {
                return;
            }
            let (space, log, said) = (space.clone(), Arc::clone(&log), Arc::clone(&said));
            let also = Arc::clone(&log);
            log.step(|| format!("the driver is installing an entry for {page}; meanwhile a non-blocking discard of it"));
            let over = own.run(Duration::from_secs(3), move || {
                let result = space.try_discard(page);
                said.store(true, SeqCst);
                log.step(|| match result {
                    Ok(()) => "the discard is over".to_owned(),
                    Err(error) => format!("the discard was refused: {error}"),
                });
            });
            if !over {
                also.find(Rule::Refuse, || {
                    format!("a non-blocking discard of {page} waited for whoever was installing an entry")
                });
            }
        })));
        if !can {
            lab.log
                .skip("the model of the device does not tell when an entry is installed");
            break;
        }
        let written = open.session.write(page.start(), nth + 1);
        lab.hardware.on_install(None);
        threads.join();
        if let Err(error) = written {
            let did = || format!("a write to {page} that a refused operation met: {error}");
            lab.log.find(Rule::Balance, did);
        }
        lab.expect(
            &open.session,
            page.start(),
            nth + 2,
            Access::Done,
            Rule::Install,
        );
        if lab.log.has_found() {
            break;
        }
        lab.space.unmap(page)?;
        lab.expect(
            &open.session,
            page.start(),
            nth + 3,
            Access::Fault,
            Rule::Stale,
        );
    }
    lab.close(open);
    // A driver that installs without its lock is asked elsewhere.
    lab.finish(Rule::Install);
    Ok(())
}
