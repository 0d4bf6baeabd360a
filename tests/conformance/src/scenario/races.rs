//! A fault beside an invalidation, with each step of the one between two steps of the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use shootdown::{Addr, PageSize, Range};

use crate::author::{Access, Driver, Failure, Hardware, Session};
use crate::lab::{Beside, Lab, MOMENT, part, wait_for};
use crate::memory::judge;
use crate::rule::Rule;

/// Faults that are disturbed.
const ROUNDS: u64 = 6;
/// Changes that did not come between, after which no more are tried: the driver excludes them.
const MISSES: u32 = 2;

/// Discards `victim` on another thread at the `nth` time that `within` is translated, so that what the translation says is out of
/// date when the driver gets it. A driver that holds the map lock meanwhile keeps the discard out, as it may.
fn disturb<D: Driver>(lab: &Lab<D>, between: &Between, nth: u32, within: Range, victim: Range) {
    let Between {
        threads,
        kept_out,
        seen,
    } = between.clone();
    let times = AtomicU32::new(0);
    let (space, log) = (lab.space.clone(), Arc::clone(&lab.log));
    lab.memory.on_translate(Some(Arc::new(move |addr: Addr| {
        seen.fetch_add(u32::from(within.holds(addr)), SeqCst);
        if !within.holds(addr)
            || times.fetch_add(1, SeqCst) != nth
            || kept_out.load(SeqCst) >= MISSES
        {
            return;
        }
        log.step(|| {
            format!("{addr} has been translated; before the driver gets it, {victim} is discarded")
        });
        let own = space.clone();
        if !threads.run(MOMENT, move || drop(own.discard(victim))) {
            kept_out.fetch_add(1, SeqCst);
            log.step(|| "the discard is kept out".to_owned());
        }
    })));
}

/// The discards that come between, and how many did not.
#[derive(Clone, Default)]
struct Between {
    threads: Arc<Beside>,
    kept_out: Arc<AtomicU32>,
    /// Translations of what is disturbed.
    seen: Arc<AtomicU32>,
}

pub(super) fn between<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    disturbed(&lab, PageSize::FourKiB, 0..1, Rule::Retry)?;
    // Part of a huge page, but not the part that the device has missed on.
    if !lab.log.has_found() {
        disturbed(&lab, PageSize::TwoMiB, 5..6, Rule::WholeEntry)?;
    }
    lab.finish(Rule::Retry);
    Ok(())
}

fn disturbed<D: Driver>(
    lab: &Lab<D>,
    size: PageSize,
    victim: std::ops::Range<u64>,
    rule: Rule,
) -> Result<(), Failure> {
    let between = Between::default();
    for round in 0..ROUNDS {
        let data = lab.map(size.bytes().max(16 << 12), size)?;
        let victim = part(data, victim.clone());
        let open = lab.open(data)?;
        disturb(lab, &between, round as u32 % 3, part(data, 0..1), victim);
        let done = open.session.write(data.start(), round + 1)?;
        lab.memory.on_translate(None);
        between.threads.join();
        lab.log.step(|| format!("the device uses {victim}"));
        if done == Access::Done {
            lab.expect(&open.session, victim.start(), round + 2, Access::Done, rule);
        }
        lab.judge(rule);
        lab.close(open);
        lab.space.unmap(data)?;
        if lab.log.has_found() {
            break;
        }
    }
    if between.seen.load(SeqCst) == 0 {
        lab.log.skip(format!(
            "the driver did not ask the space where pages of {size} are"
        ));
    }
    Ok(())
}

/// At the very moment when pages change the device misses: on them, and beside them in the same huge page.
pub(super) fn during<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    missing(&lab, PageSize::FourKiB, 3, 3, Rule::Begin)?;
    if !lab.log.has_found() {
        missing(&lab, PageSize::TwoMiB, 0, 5, Rule::WholeEntry)?;
    }
    lab.finish(Rule::Begin);
    Ok(())
}

fn missing<D: Driver>(
    lab: &Lab<D>,
    size: PageSize,
    miss: u64,
    victim: u64,
    rule: Rule,
) -> Result<(), Failure> {
    let threads = Arc::new(Beside::default());
    for round in 0..ROUNDS {
        let data = lab.map(size.bytes().max(16 << 12), size)?;
        let open = lab.open(data)?;
        let (miss, victim) = (part(data, miss..miss + 1), part(data, victim..victim + 1));
        lab.touch(&open.session, miss);
        let (session, memory, log) = (
            Arc::clone(&open.session),
            Arc::clone(&lab.memory),
            Arc::clone(&lab.log),
        );
        let started = Arc::clone(&threads);
        lab.memory.on_change(Some(Arc::new(move |part: Range| {
            if part != victim {
                return;
            }
            log.step(|| {
                format!("every device has acknowledged; before {victim} changes the device misses on {miss}")
            });
            let session = Arc::clone(&session);
            // Whatever comes of it: it waits for the end of the operation, and then finds what is there.
            started.run(Duration::ZERO, move || drop(session.write(miss.start(), 99)));
            let mut found = None;
            wait_for(MOMENT / 4, || {
                found = memory.reach(victim);
                found.is_some()
            });
            if let Some(reach) = found {
                let (_, how) = judge(reach);
                log.find(rule, || {
                    format!("between the flush of {victim} and its change, {how}")
                });
            }
        })));
        if round % 2 == 0 {
            lab.space.discard(victim)?;
        } else {
            lab.space.unmap(victim)?;
        }
        lab.memory.on_change(None);
        threads.join();
        lab.judge(rule);
        if round % 2 == 1 {
            let again = shootdown::Map::anonymous(victim.len() as u64).at(victim.start());
            lab.space.map(again)?;
        }
        lab.close(open);
        lab.space.unmap(data)?;
        if lab.log.has_found() {
            break;
        }
    }
    Ok(())
}

/// While the device takes an entry up its page changes: the handler waits for the lock that the driver installs under.
pub(super) fn installing<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(16 << 12, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    let threads = Arc::new(Beside::default());
    for round in 0..ROUNDS {
        let page = part(data, round..round + 1);
        let (space, log) = (lab.space.clone(), Arc::clone(&lab.log));
        let (times, own_threads) = (AtomicU32::new(0), Arc::clone(&threads));
        let can = lab.hardware.on_install(Some(Arc::new(move |entry: Range| {
            if !entry.overlaps(page) || times.fetch_add(1, SeqCst) > 0 {
                return;
            }
            log.step(|| {
                format!("the driver is installing an entry for {page}; meanwhile it is discarded")
            });
            let own = space.clone();
            if own_threads.run(MOMENT / 4, move || drop(own.discard(page))) {
                log.step(|| "the discard is over; now the entry is installed".to_owned());
            }
        })));
        if !can {
            lab.log
                .skip("the model of the device does not tell when an entry is installed");
            break;
        }
        // Not looked at in memory yet: the discard that was held up may come after it.
        open.session.write(page.start(), round + 1)?;
        lab.hardware.on_install(None);
        threads.join();
        lab.expect(
            &open.session,
            page.start(),
            round + 2,
            Access::Done,
            Rule::Install,
        );
        lab.judge(Rule::Install);
        if lab.log.has_found() {
            break;
        }
    }
    lab.close(open);
    lab.finish(Rule::Install);
    Ok(())
}
