//! Virtual addresses, page sizes and ranges that are never empty.
//!
//! A [`Range`] is stored by its first and last byte, so that it may end at 2^64 and can neither be
//! empty nor overflow: `start == end` taken as "everything" is a bug that cannot be written here.

use std::fmt;

use thiserror::Error;

/// A virtual address of an address space: of a process, of a guest, or an IOVA. In bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Addr(u64);

impl Addr {
    /// The address `raw`, in bytes.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The address in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address of the page of size `page` that holds this address.
    pub const fn align_down(self, page: PageSize) -> Self {
        Self(self.0 & !(page.bytes() - 1))
    }

    /// Whether this address begins a page of size `page`.
    pub const fn is_aligned(self, page: PageSize) -> bool {
        self.0 & (page.bytes() - 1) == 0
    }

    /// The address `bytes` further on; `None` past the last address.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }
}

impl From<u64> for Addr {
    fn from(raw: u64) -> Self {
        Self(raw)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A page size, by its power of two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB, the base page.
    FourKiB = 12,
    /// 64 KiB.
    SixtyFourKiB = 16,
    /// 2 MiB, a huge page.
    TwoMiB = 21,
}

impl PageSize {
    /// All page sizes, the smallest first.
    pub const ALL: [PageSize; 3] = [Self::FourKiB, Self::SixtyFourKiB, Self::TwoMiB];

    /// log2 of the size in bytes.
    pub const fn shift(self) -> u32 {
        self as u32
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FourKiB => "4 KiB",
            Self::SixtyFourKiB => "64 KiB",
            Self::TwoMiB => "2 MiB",
        })
    }
}

bitflags::bitflags! {
    /// A set of page sizes; each flag's bit is the size in bytes.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct PageSizes: u64 {
        /// 4 KiB pages.
        const FOUR_KIB = 1 << 12;
        /// 64 KiB pages.
        const SIXTY_FOUR_KIB = 1 << 16;
        /// 2 MiB pages.
        const TWO_MIB = 1 << 21;
    }
}

impl From<PageSize> for PageSizes {
    fn from(size: PageSize) -> Self {
        Self::from_bits_truncate(size.bytes())
    }
}

impl PageSizes {
    /// The sizes of the set, the smallest first.
    pub fn sizes(self) -> impl Iterator<Item = PageSize> {
        PageSize::ALL
            .into_iter()
            .filter(move |size| self.contains((*size).into()))
    }
}

/// Why a range could not be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum RangeError {
    /// A length of zero.
    #[error("empty range at {start}: a range has at least one byte")]
    Empty {
        /// The address that was given.
        start: Addr,
    },
    /// The range would pass the last address.
    #[error("range of {len:#x} bytes at {start} passes the end of the address space (2^64)")]
    Overflow {
        /// The address that was given.
        start: Addr,
        /// The length in bytes that was given.
        len: u64,
    },
}

/// A range of addresses that is never empty and may end at 2^64.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    start: Addr,
    last: Addr,
}

impl Range {
    /// Every address.
    pub const ALL: Self = Self {
        start: Addr::new(0),
        last: Addr::new(u64::MAX),
    };

    /// `len` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError::Empty`] for no bytes, [`RangeError::Overflow`] past 2^64 (ending exactly there is fine).
    #[inline]
    pub fn new(start: impl Into<Addr>, len: u64) -> Result<Self, RangeError> {
        let start = start.into();
        if len == 0 && planted!("r23") {
            return Ok(Self::ALL);
        }
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        if planted!("r23-end") {
            let last = Addr::new(start.get().wrapping_add(len - 1));
            return Ok(Self { start, last });
        }
        let last = start
            .checked_add(len - 1)
            .ok_or(RangeError::Overflow { start, len })?;
        Ok(Self { start, last })
    }

    /// From `start` to `last`, both included.
    ///
    /// # Errors
    /// [`RangeError::Empty`] when `last` lies before `start`.
    #[inline]
    pub fn inclusive(start: impl Into<Addr>, last: impl Into<Addr>) -> Result<Self, RangeError> {
        let (start, last) = (start.into(), last.into());
        if last < start {
            return Err(RangeError::Empty { start });
        }
        Ok(Self { start, last })
    }

    /// The page of size `page` that holds `addr`.
    pub const fn page(addr: Addr, page: PageSize) -> Self {
        let start = addr.align_down(page);
        Self {
            start,
            last: Addr::new(start.get() | (page.bytes() - 1)),
        }
    }

    /// The first address.
    pub const fn start(self) -> Addr {
        self.start
    }

    /// The last address that is inside.
    pub const fn last(self) -> Addr {
        self.last
    }

    /// The first address after the range; `None` where that is 2^64.
    pub const fn end(self) -> Option<Addr> {
        self.last.checked_add(1)
    }

    /// The length in bytes; 2^64 for [`Range::ALL`].
    pub const fn len(self) -> u128 {
        (self.last.get() - self.start.get()) as u128 + 1
    }

    /// Always false; here for those who expect it beside [`Range::len`].
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Whether the two share an address.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.get() <= other.last.get() && other.start.get() <= self.last.get()
    }

    /// Whether `addr` is inside.
    pub const fn holds(self, addr: Addr) -> bool {
        self.start.get() <= addr.get() && addr.get() <= self.last.get()
    }

    /// Whether all of `other` is inside.
    pub const fn contains(self, other: Self) -> bool {
        self.start.get() <= other.start.get() && other.last.get() <= self.last.get()
    }

    /// What both share.
    #[inline]
    pub fn intersect(self, other: Self) -> Option<Self> {
        self.overlaps(other).then(|| self.clip(other))
    }

    /// The same of two that overlap.
    #[inline]
    pub(crate) fn clip(self, other: Self) -> Self {
        debug_assert!(self.overlaps(other), "{self:?} and {other:?} share nothing");
        Self {
            start: self.start.max(other.start),
            last: self.last.min(other.last),
        }
    }

    /// The smallest range that holds both.
    pub fn hull(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            last: self.last.max(other.last),
        }
    }

    /// Widened to whole pages of size `page`.
    pub const fn align_out(self, page: PageSize) -> Self {
        Self {
            start: self.start.align_down(page),
            last: Addr::new(self.last.get() | (page.bytes() - 1)),
        }
    }

    /// Whether it begins and ends at a page border.
    pub const fn is_aligned(self, page: PageSize) -> bool {
        let whole = self.align_out(page);
        whole.start.get() == self.start.get() && whole.last.get() == self.last.get()
    }

    /// How many pages of size `page` it touches.
    pub const fn pages(self, page: PageSize) -> u64 {
        (self.last.get() >> page.shift()) - (self.start.get() >> page.shift()) + 1
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}]", self.start.get(), self.last.get())
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_range_is_a_typed_error() {
        let start = Addr::new(0x1000);
        assert_eq!(Range::new(start, 0), Err(RangeError::Empty { start }));
        assert_eq!(
            Range::inclusive(start, 0xfff),
            Err(RangeError::Empty { start })
        );
    }

    #[test]
    fn a_range_may_end_at_two_to_the_64_and_not_pass_it() {
        let top = Range::new(u64::MAX - 0xfff, 0x1000).unwrap();
        assert_eq!(top.end(), None);
        assert_eq!(top.len(), 0x1000);
        assert!(matches!(
            Range::new(u64::MAX - 0xfff, 0x1001),
            Err(RangeError::Overflow { len: 0x1001, .. })
        ));
        assert_eq!(Range::ALL.len(), 1 << 64);
        assert_eq!(Range::ALL.pages(PageSize::FourKiB), 1 << 52);
    }

    #[test]
    fn intersection_is_what_both_share() {
        let a = Range::new(0x1000, 0x2000).unwrap();
        let b = Range::new(0x2000, 0x2000).unwrap();
        assert_eq!(a.intersect(b), Some(Range::new(0x2000, 0x1000).unwrap()));
        assert_eq!(a.intersect(Range::new(0x3000, 1).unwrap()), None);
        assert!(a.hull(b).contains(a) && a.hull(b).contains(b));
    }

    #[test]
    fn widening_covers_whole_pages() {
        let r = Range::new(0x1f_f000, 0x2000).unwrap();
        assert_eq!(
            r.align_out(PageSize::TwoMiB),
            Range::new(0, 0x40_0000).unwrap()
        );
        assert_eq!(r.pages(PageSize::TwoMiB), 2);
        assert_eq!(r.pages(PageSize::FourKiB), 2);
    }
}
