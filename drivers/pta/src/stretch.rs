//! Stretches: page requests of one address space that lie side by side, and what is installed round them, by one begin and one retry.
//!
//! The sequence of the invalidations is begun for all that is to be installed, the page table is walked there, and the entries are
//! written under the lock under which the sequence is checked once more: so none is written that an invalidation has passed (R9, R34).
//! Where one has come between for any page, nothing of the stretch is installed.
//!
//! # What is installed that nobody asked for
//! Each page stands in an aligned window, which the [configuration](crate::Config::fault_around) sets. Of its other pages are installed
//! * those that are mapped: the page table is walked, and no page is faulted in for it, made ready or touched. So nothing is spent on
//!   what may never be used, no copy-on-write is broken, and a page that the CPU is kept away from stays so;
//! * those that the device does not have yet: an entry that is there keeps its rights;
//! * with the rights of their mapping, but writable only if somebody in the stretch asked to write, and the mapping allows it already;
//! * inside of the registration, as nobody would tell of changes elsewhere, and inside of the 2 MiB of one table of pages, so that the
//!   tables that one entry may need are enough for all.

use shootdown_primitive::time::{Duration, Instant};

use shootdown::{
    Addr, AddressSpace, DeviceError, FaultError, Frame, PageSize, Range, Rights, Translation,
};

use crate::device::Core;
use crate::mirror::{Mirror, NoTable, Spares};
use crate::pta::Config;
use crate::queue::Work;

const SMALL: PageSize = PageSize::FourKiB;
const HUGE: PageSize = PageSize::TwoMiB;

/// A page request.
pub(crate) struct Request {
    pub(crate) pasid: u64,
    pub(crate) group: u64,
    pub(crate) addr: Addr,
    pub(crate) needed: Rights,
    pub(crate) taken: Instant,
    /// What came of the last try.
    pub(crate) fill: Fill,
}

/// What came of a try.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    Installed,
    /// Nothing is mapped, or not with the rights that are needed.
    NotAllowed,
    /// An invalidation came between.
    Disturbed,
}

pub(crate) enum Failed {
    Device(DeviceError),
    Fault(FaultError),
}

impl From<DeviceError> for Failed {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl From<FaultError> for Failed {
    fn from(error: FaultError) -> Self {
        Self::Fault(error)
    }
}

/// What is had before the driver's lock is taken, under which nothing is allocated.
#[derive(Default)]
pub(crate) struct Scratch {
    spares: Spares,
    /// In order of their addresses.
    pages: Vec<Translation>,
}

impl Scratch {
    pub(crate) fn give_back(self, core: &Core) {
        self.spares.give_back(core);
    }
}

/// The window round the page at `addr`.
fn window(config: &Config, addr: Addr) -> Range {
    let most = HUGE.bytes() / SMALL.bytes();
    // Clamped first: the next power of two of a number that is too large is none.
    let pages = config.fault_around.clamp(1, most).next_power_of_two();
    let within = pages * SMALL.bytes() - 1;
    let start = addr.get() & !within;
    let window = Range::inclusive(start, start | within);
    window.unwrap_or(Range::page(addr, SMALL))
}

/// The first stretch of `requests`, which are in order: how many, and the windows of them all.
pub(crate) fn first(config: &Config, requests: &[Request]) -> (usize, Range) {
    let (pasid, addr) = (requests[0].pasid, requests[0].addr);
    let mut reach = window(config, addr);
    let mut count = 1;
    for next in requests.iter().take(config.fault_batch).skip(1) {
        let window = window(config, next.addr);
        let is_beside = reach.end().is_none_or(|end| window.start() <= end);
        let same_table = Range::page(addr, HUGE).holds(next.addr);
        if next.pasid != pasid || !is_beside || !same_table {
            break;
        }
        reach = reach.hull(window);
        count += 1;
    }
    (count, reach)
}

/// What is to be installed for requests with the windows `reach`: whole pages of the memory, and a huge one alone, inside of the
/// registration.
fn whole(space: &AddressSpace, requests: &[Request], reach: Range, registered: Range) -> Range {
    let mut whole = reach;
    for one in requests {
        if whole.len() >= u128::from(HUGE.bytes()) {
            break;
        }
        if let Some(found) = space.translate(one.addr) {
            whole = whole.hull(found.page);
        }
    }
    whole.intersect(registered).unwrap_or(whole)
}

/// The pages of `part` as the device has them: of 2 MiB, or of 4 KiB.
fn pages(space: &AddressSpace, part: Range, pages: &mut Vec<Translation>) {
    pages.clear();
    space.walk(part, &mut |found| {
        let Some(inside) = found.page.intersect(part) else {
            return;
        };
        if found.page_size == HUGE && inside == found.page {
            return pages.push(found);
        }
        let inside = inside.align_out(SMALL);
        let small = (0..inside.pages(SMALL)).map(|nth| {
            let addr = Addr::new(inside.start().get() + (nth << SMALL.shift()));
            let into = (addr.get() - found.page.start().get()) >> SMALL.shift();
            Translation {
                page: Range::page(addr, SMALL),
                page_size: SMALL,
                frame: Frame(found.frame.0 + into),
                rights: found.rights,
            }
        });
        // A registration may end within a page.
        pages.extend(small.filter(|one| part.contains(one.page)));
    });
}

fn refuse(requests: &mut [Request]) {
    requests
        .iter_mut()
        .for_each(|one| one.fill = Fill::NotAllowed);
}

/// Writes what `scratch` has found, and says of each request that it was installed if its page was; or no table was left.
fn install(
    core: &Core,
    mirror: &mut Mirror,
    requests: &mut [Request],
    scratch: &mut Scratch,
) -> Result<Result<(), NoTable>, DeviceError> {
    let asked = (requests.iter()).fold(Rights::READ, |asked, one| asked | one.needed);
    let mut around = 0;
    for page in &scratch.pages {
        // Both are in order.
        let first = requests.partition_point(|one| one.addr < page.page.start());
        let own = (requests[first..].iter_mut()).take_while(|one| page.page.holds(one.addr));
        let (mut is_asked, mut allowed) = (false, false);
        for one in own {
            is_asked = true;
            if page.rights.contains(one.needed) {
                (one.fill, allowed) = (Fill::Installed, true);
            }
        }
        let rights = if is_asked {
            page.rights
        } else {
            page.rights & asked
        };
        let wanted = if is_asked {
            allowed
        } else {
            !rights.is_empty() && !mirror.holds(page.page.start())
        };
        if wanted {
            let page = Translation { rights, ..*page };
            if let Err(none) = mirror.install(&page, &mut scratch.spares)? {
                return Ok(Err(none));
            }
            around += u64::from(!is_asked);
        }
    }
    core.counters.pages_around.add(around);
    Ok(Ok(()))
}

/// Installs what a stretch asks for, as far as it may, and what is round it: whether it could, or else an invalidation has come between.
pub(crate) fn fill(
    core: &Core,
    (work, space): (&Work, &AddressSpace),
    (requests, reach): (&mut [Request], Range),
    patience: Duration,
    scratch: &mut Scratch,
) -> Result<bool, Failed> {
    scratch.spares.fill(core);
    let registered = work.share.range();
    loop {
        let part = whole(space, requests, reach, registered);
        let sequence = work.share.begin(part, patience)?;
        pages(space, part, &mut scratch.pages);
        // A large page may have been split, or mapped, meanwhile: the sequence has to cover what is installed.
        if whole(space, requests, reach, registered) != part {
            continue;
        }
        let mut mirror = work.space.mirror.lock();
        if sequence.retry(&mirror) {
            return Ok(false);
        }
        refuse(requests);
        if install(core, &mut mirror, requests, scratch)?.is_ok() {
            let filled = requests.iter().any(|one| one.fill == Fill::Installed);
            core.counters.request_batches.add(filled.into());
            return Ok(true);
        }
        drop(mirror);
        if scratch.spares.fill(core) {
            continue;
        }
        let mut mirror = work.space.mirror.lock();
        if !mirror.suffices() {
            tracing::warn!(limit = core.table_limit, "no table of local memory is free");
            refuse(requests);
            return Ok(true);
        }
        // All that it has is dropped, and faults anew.
        core.counters.mirrors_recycled.hit();
        mirror.recycle()?;
    }
}

#[cfg(test)]
mod tests {
    use shootdown::{Deadlines, Map};
    use shootdown_hw_model::{Bus, ModelMemory};

    use super::*;

    const BASE: u64 = 1 << 30;

    fn config(fault_batch: usize, fault_around: u64) -> Config {
        Config {
            fault_batch,
            fault_around,
            ..Config::default()
        }
    }

    /// Requests for pages, counted from `BASE`, each of a PASID.
    fn requests(pages: &[(u64, u64)]) -> Vec<Request> {
        let request = |&(pasid, page): &(u64, u64)| Request {
            pasid,
            group: 0,
            addr: Addr::new(BASE + page * SMALL.bytes()),
            needed: Rights::READ,
            taken: Instant::now(),
            fill: Fill::Disturbed,
        };
        pages.iter().map(request).collect()
    }

    fn part(first: u64, pages: u64) -> Range {
        Range::new(BASE + first * SMALL.bytes(), pages * SMALL.bytes()).unwrap()
    }

    #[test]
    fn a_window_is_aligned_and_lies_in_one_table_of_pages() {
        for (around, first, pages) in [
            (0, 37, 1),
            (1, 37, 1),
            (2, 36, 2),
            (3, 36, 4),
            (16, 32, 16),
            (512, 0, 512),
            (513, 0, 512),
            (u64::MAX, 0, 512),
        ] {
            let addr = Addr::new(part(37, 1).start().get() + 5);
            assert_eq!(window(&config(64, around), addr), part(first, pages));
        }
    }

    #[test]
    fn a_stretch_is_of_windows_side_by_side_of_one_space_and_one_table_up_to_a_batch() {
        let near = [(1, 3), (1, 3), (1, 4), (1, 5), (1, 7)];
        for (requested, of, count, reach) in [
            (&near[..], (64, 1), 4, part(3, 3)),
            (&near[..], (64, 2), 5, part(2, 6)),
            (&near[..], (3, 1), 3, part(3, 2)),
            (&near[..], (1, 1), 1, part(3, 1)),
            (&near[..], (0, 4), 1, part(0, 4)),
            (&[(1, 3), (2, 4)], (64, 1), 1, part(3, 1)),
            (&[(1, 511), (1, 512)], (64, 1), 1, part(511, 1)),
            (&[(1, 511), (1, 512)], (64, 512), 1, part(0, 512)),
        ] {
            let found = first(&config(of.0, of.1), &requests(requested));
            assert_eq!(found, (count, reach), "{requested:?} {of:?}");
        }
    }

    #[test]
    fn nothing_is_installed_beyond_the_registration_and_a_huge_page_only_whole() {
        let bus = Bus::new(4 << 10).unwrap();
        let memory = ModelMemory::new(&bus, 16 << 20).unwrap();
        let space = AddressSpace::managed(memory, Deadlines::default());
        let huge = Map::anonymous(HUGE.bytes()).page_size(HUGE);
        let huge = space.map(huge).unwrap();
        let mut requests = requests(&[(1, 0)]);
        requests[0].addr = Addr::new(huge.start().get() + 9 * SMALL.bytes());
        let own = Range::page(requests[0].addr, SMALL);
        let registered = Range::new(huge.start(), 100 * SMALL.bytes()).unwrap();
        let found = |registered: Range| {
            let mut found = Vec::new();
            let part = whole(&space, &requests, own, registered);
            pages(&space, part, &mut found);
            (part, found)
        };
        let (part, all) = found(Range::ALL);
        assert_eq!((part, all.len(), all[0].page), (huge, 1, huge));
        let ends_within = Range::new(huge.start(), 100 * SMALL.bytes() + 8).unwrap();
        assert_eq!(found(ends_within).1.len(), 100);
        let (part, small) = found(registered);
        assert_eq!((part, small.len()), (registered, 100));
        for (nth, page) in (0..).zip(&small) {
            assert!(registered.contains(page.page) && page.page_size == SMALL);
            assert_eq!(page.frame, Frame(all[0].frame.0 + nth));
        }
    }
}
