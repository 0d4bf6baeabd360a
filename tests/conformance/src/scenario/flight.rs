//! Pages that change while the device works on them, or elsewhere.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use shootdown::{Map, PageSize, Range};

use crate::author::{Driver, Failure, Hardware, Reach, Session};
use crate::lab::{Beside, Lab, MOMENT, Open, PAGE, part, wait_for};
use crate::rule::Rule;

/// Pages that are worked on.
const PAGES: u64 = 16;

pub(super) fn below<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    lab.touch(&open.session, data);
    if lab.hardware.hold(false) {
        held(&lab, &open, data)?;
    }
    for round in 0..20_u32 {
        if lab.log.has_found() {
            break;
        }
        lab.log.step(|| format!("work on {data} begins"));
        open.session.start(data)?;
        let (first, pause) = {
            let mut rng = lab
                .rng
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            (rng.random_range(0..PAGES - 2), rng.random_range(0..500))
        };
        std::thread::sleep(Duration::from_micros(pause));
        let gone = part(data, first..first + 2);
        if round % 2 == 0 {
            lab.log.step(|| format!("unmap of {gone}"));
            lab.space.unmap(gone)?;
            open.session.settle()?;
            lab.space.map(Map::anonymous(2 * PAGE).at(gone.start()))?;
        } else {
            lab.log.step(|| format!("discard of {gone}"));
            lab.space.discard(gone)?;
            open.session.settle()?;
        }
        lab.judge(Rule::Drain);
        lab.touch(&open.session, data);
    }
    lab.close(open);
    lab.finish(Rule::Drain);
    Ok(())
}

/// Work is kept at a page while that is unmapped: the unmap has to wait for it.
fn held<D: Driver>(lab: &Lab<D>, open: &Open<D::Session>, data: Range) -> Result<(), Failure> {
    let page = part(data, 0..1);
    lab.hardware.hold(true);
    open.session.start(page)?;
    let works = || matches!(lab.memory.reach(page), Some(Reach::Work { .. }));
    if !wait_for(Duration::from_secs(5), works) {
        return Err("the work that was started never came to its page".into());
    }
    lab.log
        .step(|| format!("work is at {page}, which is unmapped"));
    let (space, log, threads) = (lab.space.clone(), Arc::clone(&lab.log), Beside::default());
    threads.run(MOMENT / 2, move || {
        if let Err(error) = space.unmap(page) {
            log.find(Rule::Drain, || {
                format!("an unmap below work in flight failed: {error}")
            });
        }
    });
    lab.log.step(|| "the work is let go on".to_owned());
    lab.hardware.hold(false);
    threads.join();
    open.session.settle()?;
    lab.space.map(Map::anonymous(PAGE).at(page.start()))?;
    lab.judge(Rule::Drain);
    lab.touch(&open.session, page);
    Ok(())
}

/// Long work on one page must not hold up an operation on another.
pub(super) fn elsewhere<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    if !lab.hardware.hold(false) {
        lab.log
            .skip("the model of the device cannot keep work from ending");
        lab.finish(Rule::Blocks);
        return Ok(());
    }
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    lab.touch(&open.session, data);
    let (busy, other) = (part(data, 0..1), part(data, 8..9));
    lab.hardware.hold(true);
    open.session.start(busy)?;
    let works = || matches!(lab.memory.reach(busy), Some(Reach::Work { .. }));
    if !wait_for(Duration::from_secs(5), works) {
        return Err("the work that was started never came to its page".into());
    }
    lab.log
        .step(|| format!("work on {busy} does not end; meanwhile {other} is unmapped"));
    let (space, log, threads) = (lab.space.clone(), Arc::clone(&lab.log), Beside::default());
    threads.run(Duration::ZERO, move || match space.unmap(other) {
        Ok(()) => log.step(|| "the unmap is over".to_owned()),
        Err(error) => log.find(Rule::Blocks, || {
            format!("the unmap of a page beside the work failed: {error}")
        }),
    });
    // The watchdog says when it is too long, not a clock of the kit's.
    let over = |lab: &Lab<D>| threads.finished() || lab.space.stats().overdue > 0;
    wait_for(Duration::from_secs(30), || over(&lab));
    if !threads.finished() {
        lab.log.find(Rule::Blocks, || {
            format!(
                "an unmap of {other} waited for work on {busy}, says the watchdog: a callback did not return; {}",
                lab.log.newest()
            )
        });
    }
    lab.hardware.hold(false);
    threads.join();
    open.session.settle()?;
    lab.close(open);
    lab.finish(Rule::Blocks);
    Ok(())
}
