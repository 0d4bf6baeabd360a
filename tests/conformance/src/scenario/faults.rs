//! Devices that do not answer, or answer wrongly.

use std::time::Duration;

use shootdown::{Health, InvalidateError, Map, MapError, PageSize, Range};

use crate::author::{Access, Driver, Failure, Hardware, Reach, Session};
use crate::lab::{Lab, Open, PAGE, part, wait_for};
use crate::rule::Rule;

const PAGES: u64 = 16;
const ROUNDS: u64 = 12;
/// How long a device may take to come back.
const LONG: Duration = Duration::from_secs(5);

/// A session that is opened anew when the device has lost it.
struct Again<'l, D: Driver> {
    lab: &'l Lab<D>,
    data: Range,
    open: Option<Open<D::Session>>,
}

impl<D: Driver> Again<'_, D> {
    fn write(&mut self, nth: u64, value: u64) -> Result<Access, Failure> {
        let at = part(self.data, nth..nth + 1).start();
        let mut last = None;
        for _ in 0..3 {
            let open = match self.open.take() {
                Some(open) => open,
                None => self.lab.open(self.data)?,
            };
            match open.session.write(at, value) {
                Ok(Access::Lost) => {}
                Ok(said) => {
                    self.open = Some(open);
                    return Ok(said);
                }
                Err(error) => last = Some(error),
            }
            self.lab
                .log
                .step(|| "the device has lost the session: another is opened".to_owned());
        }
        Err(last.unwrap_or_else(|| "every new session is lost".into()))
    }
}

/// Whether the operation ended as one may that met a device which does not answer.
fn legal(result: &Result<(), MapError>) -> bool {
    use InvalidateError as E;
    matches!(
        result,
        Ok(())
            | Err(MapError::Invalidate(
                E::Quarantined { .. } | E::NotDrained { .. }
            ))
    )
}

/// Flushes go wrong, two at a time; a wider one or a reset helps.
pub(super) fn recovers<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let mut again = Again {
        lab: &lab,
        data,
        open: None,
    };
    for round in 0..ROUNDS {
        let numbers = [round % PAGES, (round + PAGES / 2) % PAGES];
        for nth in numbers {
            again.write(nth, 1)?;
        }
        let pages = numbers.map(|nth| part(data, nth..nth + 1));
        lab.log.step(|| {
            format!(
                "round {round}: {} and {} change at the same time",
                pages[0], pages[1]
            )
        });
        let results = std::thread::scope(|scope| {
            let lab = &lab;
            let changes = pages.map(|page| scope.spawn(move || change(lab, page, round % 2 == 0)));
            changes.map(|change| change.join().unwrap_or(false))
        });
        if results.contains(&false) {
            recover(&lab)?;
        }
        for page in pages {
            // What was unmapped, now or in the recovery, is mapped again.
            match lab.space.map(Map::anonymous(PAGE).at(page.start())) {
                Ok(_) | Err(MapError::Occupied { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if again.write(numbers[0], 3)? == Access::Fault {
            lab.log.find(Rule::Works, || {
                "after the fault the device does not work on mapped memory".to_owned()
            });
        }
        lab.judge(Rule::Escalate);
        if lab.log.has_found() {
            break;
        }
    }
    if let Some(open) = again.open.take() {
        lab.close(open);
    }
    lab.finish(Rule::Escalate);
    Ok(())
}

/// Changes a page; whether it has changed.
fn change<D: Driver>(lab: &Lab<D>, page: Range, unmap: bool) -> bool {
    let result = if unmap {
        lab.space.unmap(page)
    } else {
        lab.space.discard(page)
    };
    if !legal(&result) {
        lab.log.find(Rule::Escalate, || {
            format!("the change of {page} came to {result:?}")
        });
    }
    result.is_ok()
}

/// Brings devices back that are in quarantine, and with them the memory.
fn recover<D: Driver>(lab: &Lab<D>) -> Result<(), Failure> {
    for device in lab.driver.devices() {
        if device.health() == Health::Quarantined {
            lab.log
                .step(|| format!("{} is in quarantine and is recovered", device.name()));
            device.recover(LONG)?;
        }
    }
    lab.space.drain()?;
    if lab.space.quarantined_bytes() > 0 {
        return Err("the device was recovered, and memory stays in quarantine".into());
    }
    Ok(())
}

/// Work that never ends costs the device a reset.
pub(super) fn endless<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    let page = part(data, 0..1);
    lab.hardware.hold(false);
    lab.touch(&open.session, data);
    lab.hardware.hold(true);
    open.session.start(page)?;
    let works = || matches!(lab.memory.reach(page), Some(Reach::Work { .. }));
    if !wait_for(LONG, works) {
        return Err("the work that was started never came to its page".into());
    }
    lab.log
        .step(|| format!("work on {page} never ends; it is unmapped"));
    let result = lab.space.unmap(page);
    if !legal(&result) {
        lab.log
            .find(Rule::Escalate, || format!("the unmap came to {result:?}"));
    }
    if result.is_ok() {
        lab.nothing_reaches(page, Rule::Escalate, "after an unmap that succeeded");
    }
    lab.hardware.hold(false);
    lab.judge(Rule::Escalate);
    lab.close(open);
    lab.finish(Rule::Escalate);
    Ok(())
}

/// A device that nothing helps against: its memory is in quarantine, its callers get an error, and it is waited for once.
pub(super) fn dead<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    let data = lab.map(PAGES * PAGE, PageSize::FourKiB)?;
    let open = lab.open(data)?;
    for nth in 0..4 {
        lab.touch(&open.session, part(data, nth..nth + 1));
    }
    let mut quarantined = false;
    for nth in 0..4 {
        let page = part(data, nth..nth + 1);
        lab.log.step(|| format!("unmap of {page}"));
        let result = lab.space.unmap(page);
        if !legal(&result) {
            lab.log
                .find(Rule::Escalate, || format!("the unmap came to {result:?}"));
        }
        quarantined |= result.is_err();
    }
    if quarantined && lab.space.quarantined_bytes() == 0 {
        lab.log.find(Rule::Escalate, || {
            "the device is given up, and no memory is in quarantine".to_owned()
        });
    }
    lab.judge(Rule::Escalate);
    lab.close(open);
    lab.finish(Rule::Escalate);
    Ok(())
}
