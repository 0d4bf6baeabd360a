//! Memory that driver and controller share: queues, PRP lists, identify data. The only unsafe code of this crate.

use std::sync::atomic::{Ordering, fence};

use shootdown::{AddressSpace, Map, MapError, Range};

/// Pages of the driver's own, in its address space. Unmapped when dropped, where that is legal.
pub(crate) struct Pages {
    space: AddressSpace,
    range: Range,
}

impl Pages {
    pub(crate) fn new(space: &AddressSpace, bytes: u64) -> Result<Self, MapError> {
        Ok(Self {
            range: space.map(Map::anonymous(bytes))?,
            space: space.clone(),
        })
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    /// The place of a value.
    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(
            (offset + size_of::<T>()) as u128 <= self.range.len()
                && offset.is_multiple_of(align_of::<T>()),
            "byte {offset:#x} lies outside of the driver's {}",
            self.range
        );
        (self.range.start().get() as *mut u8)
            .wrapping_add(offset)
            .cast()
    }

    /// Reads what the controller may write; later reads happen after it.
    pub(crate) fn read32(&self, offset: usize) -> u32 {
        // SAFETY: in bounds and aligned by `place`. The pages were mapped for reading and writing by `new`, their address was told
        // to nobody, and they stay until this value is dropped. Volatile, as the controller writes them.
        let value = unsafe { self.place::<u32>(offset).read_volatile() };
        // Acquire: with the controller, which writes a completion's phase last.
        fence(Ordering::Acquire);
        value
    }

    /// As [`Pages::read32`].
    pub(crate) fn read8(&self, offset: usize) -> u8 {
        // SAFETY: as in `read32`.
        unsafe { self.place::<u8>(offset).read_volatile() }
    }

    /// Writes what the controller may read; a doorbell orders it.
    pub(crate) fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as in `read32`.
        unsafe { self.place::<u32>(offset).write_volatile(value) }
    }

    /// As [`Pages::write32`].
    pub(crate) fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // Inside a callback, or with a lock held, it is refused, and the space has them until its exit.
        let _ = self.space.unmap(self.range);
    }
}
