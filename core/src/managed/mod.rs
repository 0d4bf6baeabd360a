//! The managed source: the space's own map, unmap, protect, discard and remap.
//!
//! The table of mappings is behind a mutex that is held for short edits only. An operation *claims a span*: from then on
//! overlapping operations wait for it (or are refused, in the `try_` forms), disjoint ones go on in parallel. The plain forms
//! take the map lock to claim their span (discard and protect for read, as they leave the map as it is) and drop it before
//! the phases run, since a lock held for read would make every later unmap wait (R28); the forms on
//! [`MapWriteGuard`] keep it throughout. Waiting for a span with the map lock held is safe: nobody takes that lock
//! between start and end.
//!
//! Segments have addresses in the same table, with no memory behind them: unmapping them ends them, see [`Segment`](crate::Segment).
//!
//! An operation that a device did not acknowledge changes nothing: its pages stay where they are, marked as quarantined, and
//! are given to nobody until every device that could reach them is healthy again ([`AddressSpace::drain`]).

mod change;
mod error;
mod table;

use self::change::{Change, change, map};
pub(crate) use self::change::{Lock, map_segment, recover, unmap_part_of};
pub use self::error::MapError;
pub(crate) use self::table::Table;
use crate::addr::{Addr, PageSize, Range, RangeError};
use crate::engine::Mode;
use crate::memory::{Rights, Translation};
use crate::space::{AddressSpace, MapWriteGuard};

/// What to map.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    len: u64,
    page: PageSize,
    rights: Rights,
    at: Option<Addr>,
}

impl Map {
    /// `len` bytes of zeroed, readable and writable 4 KiB pages, anywhere.
    pub fn anonymous(len: u64) -> Self {
        Self {
            len,
            page: PageSize::FourKiB,
            rights: Rights::READ_WRITE,
            at: None,
        }
    }

    /// With pages of another size.
    pub fn page_size(self, page: PageSize) -> Self {
        Self { page, ..self }
    }

    /// With other rights.
    pub fn rights(self, rights: Rights) -> Self {
        Self { rights, ..self }
    }

    /// At this address, which must be free.
    pub fn at(self, addr: Addr) -> Self {
        Self {
            at: Some(addr),
            ..self
        }
    }
}

impl AddressSpace {
    /// Maps zeroed pages; where is returned. Waits for the map lock, and for operations at the address where one was given.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(&self, what: Map) -> Result<Range, MapError> {
        map(&self.space, what, Lock::Plain(Mode::Blocking))
    }

    /// Takes the pages of `range` away, once no device can reach them. All of it must be mapped; cutting a mapping, and a
    /// large page, is fine. Segments that it overlaps end, all of them, and their shares are put; if the change of memory beside
    /// them then fails they have ended all the same. Waits for handlers and hardware, within the deadlines.
    ///
    /// # Errors
    /// [`MapError`]; [`InvalidateError::Quarantined`](crate::InvalidateError::Quarantined) in it says that the pages are still there, and stay.
    pub fn unmap(&self, range: Range) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Unmap,
            Lock::Plain(Mode::Blocking),
        )
    }

    /// Replaces the pages by zeroed ones. As [`AddressSpace::unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    pub fn discard(&self, range: Range) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Discard,
            Lock::Plain(Mode::Blocking),
        )
    }

    /// Changes the access rights. As [`AddressSpace::unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    pub fn protect(&self, range: Range, rights: Rights) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Protect(rights),
            Lock::Plain(Mode::Blocking),
        )
    }

    /// Moves the pages to `to`, which must be free and start the range of the same length. As [`AddressSpace::unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    pub fn remap(&self, range: Range, to: Addr) -> Result<Range, MapError> {
        let to = target(range, to)?;
        change(
            &self.space,
            range,
            Change::Remap(to),
            Lock::Plain(Mode::Blocking),
        )
        .map(|()| to)
    }

    /// [`AddressSpace::unmap`] that waits neither for the map lock nor for another operation, and whose handlers do not wait for
    /// locks. Hardware is waited for.
    ///
    /// # Errors
    /// [`MapError::WouldBlock`] and [`InvalidateError::WouldBlock`](crate::InvalidateError::WouldBlock) besides.
    pub fn try_unmap(&self, range: Range) -> Result<(), MapError> {
        change(&self.space, range, Change::Unmap, Lock::Plain(Mode::Try))
    }

    /// [`AddressSpace::discard`] that does not wait, as [`AddressSpace::try_unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::try_unmap`].
    pub fn try_discard(&self, range: Range) -> Result<(), MapError> {
        change(&self.space, range, Change::Discard, Lock::Plain(Mode::Try))
    }

    /// [`AddressSpace::protect`] that does not wait, as [`AddressSpace::try_unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::try_unmap`].
    pub fn try_protect(&self, range: Range, rights: Rights) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Protect(rights),
            Lock::Plain(Mode::Try),
        )
    }

    /// [`AddressSpace::remap`] that does not wait, as [`AddressSpace::try_unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::try_unmap`].
    pub fn try_remap(&self, range: Range, to: Addr) -> Result<Range, MapError> {
        let to = target(range, to)?;
        change(
            &self.space,
            range,
            Change::Remap(to),
            Lock::Plain(Mode::Try),
        )
        .map(|()| to)
    }

    /// Walks the page table, for a fault between begin and retry. `None`: nothing is mapped at `addr`, or the memory shows
    /// no page table.
    pub fn translate(&self, addr: Addr) -> Option<Translation> {
        self.space.memory.as_ref()?.translate(addr)
    }

    /// Walks the page table of all of `range`, as [`AddressSpace::translate`] does for one address: `found` is called with each page
    /// that is mapped and overlaps it, in order, with no lock of the space held. For faults that are resolved together.
    pub fn walk(&self, range: Range, found: &mut dyn FnMut(Translation)) {
        if let Some(memory) = &self.space.memory {
            memory.walk(range, found);
        }
    }

    /// Bytes of memory in quarantine; after the exit, those that stay for as long as the process lives. Addresses of segments
    /// are no memory.
    pub fn quarantined_bytes(&self) -> u64 {
        self.space.table.quarantined()
    }
}

fn target(range: Range, to: Addr) -> Result<Range, MapError> {
    let len = u64::try_from(range.len()).map_err(|_| RangeError::Overflow {
        start: to,
        len: u64::MAX,
    })?;
    Ok(Range::new(to, len)?)
}

impl MapWriteGuard<'_> {
    /// [`AddressSpace::map`] under the lock.
    ///
    /// # Errors
    /// As there.
    pub fn map(&self, what: Map) -> Result<Range, MapError> {
        map(self.space, what, Lock::Guard)
    }

    /// [`AddressSpace::unmap`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn unmap(&self, range: Range) -> Result<(), MapError> {
        change(self.space, range, Change::Unmap, Lock::Guard)
    }

    /// [`AddressSpace::discard`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn discard(&self, range: Range) -> Result<(), MapError> {
        change(self.space, range, Change::Discard, Lock::Guard)
    }

    /// [`AddressSpace::protect`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn protect(&self, range: Range, rights: Rights) -> Result<(), MapError> {
        change(self.space, range, Change::Protect(rights), Lock::Guard)
    }

    /// [`AddressSpace::remap`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn remap(&self, range: Range, to: Addr) -> Result<Range, MapError> {
        let to = target(range, to)?;
        change(self.space, range, Change::Remap(to), Lock::Guard).map(|()| to)
    }
}
