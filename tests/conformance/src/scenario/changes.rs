//! Unmap, discard, protect and remap of pages that the device has used, whole and in part, of pages of every size.

use shootdown::{Map, PageSize, Range, Rights};

use crate::author::{Access, Driver, Failure, Session};
use crate::lab::{Lab, PAGE, pages, part};
use crate::rule::Rule;

pub(super) fn run<D: Driver>(lab: Lab<D>) -> Result<(), Failure> {
    for size in PageSize::ALL {
        one(&lab, size)?;
    }
    lab.finish(Rule::Stale);
    Ok(())
}

fn one<D: Driver>(lab: &Lab<D>, size: PageSize) -> Result<(), Failure> {
    let log = &lab.log;
    let each = size.bytes() / PAGE;
    let count = (4 * each).clamp(16, 2 * each.max(16));
    let data = lab.map(count * PAGE, size)?;
    let open = lab.open(data)?;
    let session = &*open.session;
    log.step(|| format!("a session on {data}, pages of {size}"));
    // Both ends, and across the border of two pages; in each the first and last page, and one of what is left beside it.
    let middle = count / 2;
    for gone in [0..1, count - 1..count, middle - 1..middle + 1, 2..4] {
        let beside = [gone.start.checked_sub(1), Some(gone.end)];
        let beside = beside.into_iter().flatten().filter(|nth| *nth < count);
        let gone = part(data, gone);
        let beside: Vec<Range> = beside.map(|nth| part(data, nth..nth + 1)).collect();
        let all = |of: Access, rule: Rule| {
            for (nth, at) in pages(gone).enumerate() {
                lab.expect(session, at, nth as u64 + 1, of, rule);
            }
        };
        all(Access::Done, Rule::Works);
        log.step(|| format!("unmap of {gone}"));
        lab.space.unmap(gone)?;
        all(Access::Fault, Rule::Stale);
        for one in &beside {
            lab.touch(session, *one);
        }
        log.step(|| format!("{gone} is mapped again"));
        lab.space
            .map(Map::anonymous(gone.len() as u64).at(gone.start()))?;
        all(Access::Done, Rule::Works);
        log.step(|| format!("discard of {gone}"));
        lab.space.discard(gone)?;
        all(Access::Done, Rule::Works);
        log.step(|| format!("{gone} becomes read-only"));
        lab.space.protect(gone, Rights::READ)?;
        all(Access::Fault, Rule::Stale);
        lab.space.protect(gone, Rights::READ_WRITE)?;
        all(Access::Done, Rule::Works);
        lab.judge(Rule::Stale);
    }
    moved(lab, session, data)?;
    large(lab, session, data, size)?;
    lab.close(open);
    Ok(())
}

/// A page moves to a hole.
fn moved<D: Driver>(lab: &Lab<D>, session: &D::Session, data: Range) -> Result<(), Failure> {
    let (from, to) = (part(data, 5..6), part(data, 9..10));
    lab.touch(session, from);
    lab.touch(session, to);
    lab.space.unmap(to)?;
    lab.log.step(|| format!("remap of {from} to {to}"));
    lab.space.remap(from, to.start())?;
    lab.expect(session, from.start(), 3, Access::Fault, Rule::Stale);
    lab.expect(session, to.start(), 4, Access::Done, Rule::Works);
    lab.space.map(Map::anonymous(PAGE).at(from.start()))?;
    lab.expect(session, from.start(), 5, Access::Done, Rule::Works);
    lab.judge(Rule::Stale);
    Ok(())
}

/// All that is left goes in one operation, and a page of the full size comes back in the same place.
fn large<D: Driver>(
    lab: &Lab<D>,
    session: &D::Session,
    data: Range,
    size: PageSize,
) -> Result<(), Failure> {
    lab.log.step(|| format!("unmap of all of {data}"));
    lab.space.unmap(data)?;
    lab.expect(session, data.start(), 6, Access::Fault, Rule::Stale);
    lab.space.map(
        Map::anonymous(data.len() as u64)
            .page_size(size)
            .at(data.start()),
    )?;
    lab.expect(session, data.start(), 7, Access::Done, Rule::Works);
    lab.log.step(|| format!("discard of all of {data}"));
    lab.space.discard(data)?;
    lab.expect(session, data.start(), 8, Access::Done, Rule::Works);
    session.settle()?;
    lab.judge(Rule::Stale);
    Ok(())
}
