//! The shadow of one space's page table: what is really behind each page, and since when.
//!
//! One word a 4 KiB page:
//!
//! | bits | |
//! |---|---|
//! | 0 | live: the page is mapped |
//! | 1-2 | rights |
//! | 3-28 | frame |
//! | 29-63 | epoch: the space's clock when this frame came here |
//!
//! # Protocol
//! The space has a clock that moves on with every change. A device that installs an entry notes the clock (its
//! [`Stamp`]); one stamp serves an entry of any size. A page agrees with the entry when it is live, holds the frame, and
//! has not changed since: `epoch <= stamp`. A page that is withdrawn and comes back (A to B to A) has a later epoch, even
//! where the frame is the same. `protect` leaves the epoch alone; rights are compared as they are now.
//!
//! - *withdraw*: not live any more; frame and epoch stay, so that *restore* can take it back when the change fails;
//! - *publish*: a frame, live, with a new epoch;
//! - *protect*: other rights.
//!
//! Only the memory whose shadow this is calls them, never two at a time for one page. Anybody may look, at any time,
//! without a lock.
//!
//! # Slots
//! A slot watches one space after another. Its array is made once and only cleared in between, so that a check which
//! is under way when a space goes reads memory that is still there. The identifier is read before and after the
//! entry; identifiers are never used twice, so an equal pair means that the entry was of that space.

use shootdown::{Addr, Frame, PageSize, Range, Rights};
use shootdown_primitive::sync::OnceLock;
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering, fence};

use crate::table::Table;

const LIVE: u64 = 1;
const RIGHTS_SHIFT: u32 = 1;
const RIGHTS_MASK: u64 = 3 << RIGHTS_SHIFT;
const FRAME_SHIFT: u32 = 3;
const FRAME_BITS: u32 = 26;
const EPOCH_SHIFT: u32 = FRAME_SHIFT + FRAME_BITS;

/// The last epoch, after 2^35 changes of one space: four days at 100 000 a second. The clock stops there; from then on a
/// page that changes and comes back with the same frame is not noticed, everything else still is.
const LAST_EPOCH: u64 = u64::MAX >> EPOCH_SHIFT;

/// A space's clock at the time when a device installed a TLB entry. Opaque to devices; the default
/// is that of an entry that was never installed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Stamp(u64);

/// What is behind a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Behind {
    /// The space does not exist any more.
    NoSpace,
    /// Nothing.
    Nothing,
    /// A frame.
    Frame {
        frame: Frame,
        rights: Rights,
        since: Stamp,
    },
}

impl Behind {
    /// Whether an entry for `frame` that was installed at `stamp` is still true.
    pub(crate) fn agrees(self, with: Frame, stamp: Stamp) -> bool {
        matches!(self, Self::Frame { frame, since, .. } if frame == with && since.0 <= stamp.0)
    }

    /// Whether all of `needed` are allowed.
    pub(crate) fn allows(self, needed: Rights) -> bool {
        matches!(self, Self::Frame { rights, .. } if rights.contains(needed))
    }
}

/// A place for the shadow of one space at a time.
pub(crate) struct Shadow {
    /// The space; 0 when the slot is free.
    id: AtomicU64,
    /// First address of the space's arena, in bytes.
    base: AtomicU64,
    /// Pages of 4 KiB of its arena.
    pages: AtomicU64,
    /// Changes so far.
    clock: AtomicU64,
    /// Entries; made for the first space, then kept.
    table: OnceLock<Table>,
}

impl Shadow {
    /// A free slot.
    pub(crate) const fn new() -> Self {
        Self {
            id: AtomicU64::new(0),
            base: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            clock: AtomicU64::new(0),
            table: OnceLock::new(),
        }
    }

    /// Whether a space of `pages` pages could be put here. Call under the lock that `open` needs.
    pub(crate) fn is_free_for(&self, pages: u64) -> bool {
        // Relaxed: changed under the caller's lock only.
        self.id.load(Ordering::Relaxed) == 0
            && self
                .table
                .get()
                .is_none_or(|table| table.words().len() as u64 >= pages)
    }

    /// Begins to watch the space `id`, nothing of which is mapped. The slot is free for it; calls of `open` and `close`
    /// exclude each other. May wait (system call).
    pub(crate) fn open(&self, id: u64, arena: Range) -> std::io::Result<()> {
        let pages = arena.pages(PageSize::FourKiB);
        if self.table.get().is_none() {
            // Only the caller can have set it meanwhile, and it excludes itself.
            let _ = self.table.set(Table::new(pages as usize)?);
        }
        // Release: pairs with the acquire loads in `at`. Who sees one of these sees that the last space is gone.
        self.base.store(arena.start().get(), Ordering::Release);
        self.pages.store(pages, Ordering::Release);
        self.clock.store(0, Ordering::Release);
        // Release: pairs with the first load of `at`. Who sees the identifier sees base, size and the cleared entries.
        self.id.store(id, Ordering::Release);
        Ok(())
    }

    /// Ceases to watch: every access to the space is stale from here on.
    pub(crate) fn close(&self) {
        // Release, then the fence: pairs with the second load of `at`; see `withdraw` for the fence.
        self.id.store(0, Ordering::Release);
        fence(Ordering::SeqCst);
        if let Some(table) = self.table.get() {
            table.clear();
        }
    }

    /// The clock, for an entry that is being installed.
    pub(crate) fn stamp(&self) -> Stamp {
        // Acquire: pairs with the tick in `publish`. The device got the frame from a page-table entry that was stored
        // after that tick, so it reads at least that.
        Stamp(self.clock.load(Ordering::Acquire))
    }

    /// What is behind `addr` of the space `id`.
    pub(crate) fn at(&self, id: u64, addr: Addr) -> Behind {
        // Acquire, each: with the release stores of `open`. The order is what counts: identifier, place, entry, identifier.
        if self.id.load(Ordering::Acquire) != id {
            return Behind::NoSpace;
        }
        let base = self.base.load(Ordering::Acquire);
        let pages = self.pages.load(Ordering::Acquire);
        let page = addr.get().wrapping_sub(base) >> PageSize::FourKiB.shift();
        let entry = match self
            .table
            .get()
            .and_then(|table| table.words().get(page as usize))
        {
            // Acquire: pairs with the release stores of the changes below.
            Some(word) if page < pages => word.load(Ordering::Acquire),
            _ => 0,
        };
        // Acquire for symmetry; that it is not done earlier is due to the acquire load of the entry.
        if self.id.load(Ordering::Acquire) != id {
            return Behind::NoSpace;
        }
        if entry & LIVE == 0 {
            return Behind::Nothing;
        }
        Behind::Frame {
            frame: Frame(entry >> FRAME_SHIFT & ((1 << FRAME_BITS) - 1)),
            rights: Rights::from_bits_truncate((entry >> RIGHTS_SHIFT) as u8),
            since: Stamp(entry >> EPOCH_SHIFT),
        }
    }

    /// The pages of `range` are about to go or to change. Accesses that are performed after this returns, by any device,
    /// are found stale.
    pub(crate) fn withdraw(&self, range: Range) {
        self.change(range, |_, entry| entry & !LIVE);
        // SeqCst: pairs with the fence between a device's access and the check after it. Either that check sees the entry
        // withdrawn, or the access came before everything that follows here: in particular before the frame was
        // zeroed and filled by its next owner, which it then cannot have read or spoiled.
        fence(Ordering::SeqCst);
    }

    /// The change failed: what was withdrawn is as it was.
    pub(crate) fn restore(&self, range: Range) {
        self.change(
            range,
            |_, entry| {
                if entry == 0 { entry } else { entry | LIVE }
            },
        );
    }

    /// The pages of `range` are the frames from `first` on.
    pub(crate) fn publish(&self, range: Range, first: Frame, rights: Rights) {
        // Release: pairs with `stamp`. Relaxed for the failure: nothing follows from the value then.
        let tick = self
            .clock
            .fetch_update(Ordering::Release, Ordering::Relaxed, |now| {
                (now < LAST_EPOCH).then_some(now + 1)
            })
            .map_or(LAST_EPOCH, |before| before + 1);
        self.change(range, |nth, _| {
            tick << EPOCH_SHIFT
                | (first.0 + nth) << FRAME_SHIFT
                | u64::from(rights.bits()) << RIGHTS_SHIFT
                | LIVE
        });
    }

    /// The pages of `range` are no more; their frames will be freed, or live elsewhere now.
    pub(crate) fn forget(&self, range: Range) {
        self.change(range, |_, _| 0);
    }

    /// The mapped pages of `range` have these rights.
    pub(crate) fn protect(&self, range: Range, rights: Rights) {
        self.change(range, |_, entry| {
            if entry & LIVE == 0 {
                entry
            } else {
                entry & !RIGHTS_MASK | u64::from(rights.bits()) << RIGHTS_SHIFT
            }
        });
        // SeqCst: as in `withdraw`, for accesses that the rights forbid.
        fence(Ordering::SeqCst);
    }

    /// Replaces each entry of `range` by what `to` makes of its number within the range and of what it was.
    fn change(&self, range: Range, to: impl Fn(u64, u64) -> u64) {
        // Relaxed: set before the owner of this space was told that it is watched.
        let base = self.base.load(Ordering::Relaxed);
        let first = ((range.start().get() - base) >> PageSize::FourKiB.shift()) as usize;
        let pages = range.pages(PageSize::FourKiB) as usize;
        let Some(table) = self.table.get() else {
            return;
        };
        for (nth, word) in table.words()[first..first + pages].iter().enumerate() {
            // Relaxed load: nobody else changes this page meanwhile. Release store: pairs with `at`.
            let entry = word.load(Ordering::Relaxed);
            word.store(to(nth as u64, entry), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: u64 = 77;

    fn range(page: u64, pages: u64) -> Range {
        Range::new(0x10_0000 + page * 4096, pages * 4096).unwrap()
    }

    fn open() -> Shadow {
        let shadow = Shadow::new();
        shadow.open(ID, range(0, 16)).unwrap();
        shadow
    }

    #[test]
    fn a_page_that_comes_back_with_the_same_frame_is_not_the_same() {
        let shadow = open();
        shadow.publish(range(2, 4), Frame(100), Rights::READ);
        let stamp = shadow.stamp();
        let page = range(3, 1);
        assert!(shadow.at(ID, page.start()).agrees(Frame(101), stamp));
        shadow.withdraw(page);
        shadow.publish(page, Frame(200), Rights::READ);
        shadow.withdraw(page);
        shadow.publish(page, Frame(101), Rights::READ);
        assert!(!shadow.at(ID, page.start()).agrees(Frame(101), stamp));
        assert!(shadow.at(ID, range(4, 1).start()).agrees(Frame(102), stamp));
        assert!(
            shadow
                .at(ID, page.start())
                .agrees(Frame(101), shadow.stamp())
        );
    }

    #[test]
    fn what_is_restored_is_as_it_was() {
        let shadow = open();
        shadow.publish(range(0, 2), Frame(7), Rights::READ_WRITE);
        let stamp = shadow.stamp();
        shadow.withdraw(range(0, 3));
        assert_eq!(shadow.at(ID, range(1, 1).start()), Behind::Nothing);
        shadow.restore(range(0, 3));
        assert!(shadow.at(ID, range(1, 1).start()).agrees(Frame(8), stamp));
        assert_eq!(shadow.at(ID, range(2, 1).start()), Behind::Nothing);
    }

    #[test]
    fn protect_changes_rights_and_not_the_epoch() {
        let shadow = open();
        shadow.publish(range(0, 1), Frame(7), Rights::READ_WRITE);
        let stamp = shadow.stamp();
        shadow.protect(range(0, 2), Rights::READ);
        let behind = shadow.at(ID, range(0, 1).start());
        assert!(behind.agrees(Frame(7), stamp));
        assert!(behind.allows(Rights::READ) && !behind.allows(Rights::WRITE));
        assert_eq!(shadow.at(ID, range(1, 1).start()), Behind::Nothing);
    }

    #[test]
    fn a_closed_slot_shows_neither_the_old_space_nor_its_pages_to_the_next() {
        let shadow = open();
        shadow.publish(range(0, 16), Frame(1), Rights::READ);
        shadow.close();
        assert_eq!(shadow.at(ID, range(0, 1).start()), Behind::NoSpace);
        assert!(shadow.is_free_for(16) && !shadow.is_free_for(17));
        shadow.open(ID + 1, range(8, 8)).unwrap();
        assert_eq!(shadow.at(ID, range(8, 1).start()), Behind::NoSpace);
        assert_eq!(shadow.at(ID + 1, range(8, 1).start()), Behind::Nothing);
    }

    #[test]
    fn addresses_outside_the_arena_have_nothing_behind_them() {
        let shadow = open();
        shadow.publish(range(0, 16), Frame(1), Rights::READ);
        for addr in [0, 0xf_ffff, 0x11_0000, u64::MAX] {
            assert_eq!(shadow.at(ID, Addr::new(addr)), Behind::Nothing);
        }
    }
}
