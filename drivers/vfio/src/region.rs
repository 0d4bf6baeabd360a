//! Regions: a device's registers, through mappings where the kernel allows them, through system calls where not.
//!
//! The second module with unsafe code: volatile accesses to mapped registers.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memmap2::{Advice, MmapOptions, MmapRaw};
use shootdown::{DeviceError, Registers};
use vfio_bindings::bindings::vfio as abi;

use crate::device::Handle;
use crate::error::{self, VfioError};

/// What a register can be as wide as.
pub trait Width: Copy + sealed::Sealed {
    /// In bytes.
    const BYTES: u8;
}

mod sealed {
    /// Little-endian bytes, as they are on the bus.
    pub trait Sealed: Sized {
        fn load(bytes: [u8; 8]) -> Self;
        fn store(self) -> [u8; 8];
        /// Between the bus and the CPU, in either direction.
        fn swapped(self) -> Self;
    }
}

macro_rules! width {
    ($($int:ty: $bytes:literal),*) => {$(
        impl Width for $int {
            const BYTES: u8 = $bytes;
        }
        impl sealed::Sealed for $int {
            fn load(bytes: [u8; 8]) -> Self {
                let mut own = [0; $bytes];
                own.copy_from_slice(&bytes[..$bytes]);
                Self::from_le_bytes(own)
            }
            fn store(self) -> [u8; 8] {
                let mut bytes = [0; 8];
                bytes[..$bytes].copy_from_slice(&self.to_le_bytes());
                bytes
            }
            fn swapped(self) -> Self {
                self.to_le()
            }
        }
    )*};
}

width!(u8: 1, u16: 2, u32: 4, u64: 8);

/// A part of a region that is mapped.
struct Area {
    offset: u64,
    mapping: MmapRaw,
}

/// A region of a device, a BAR most often.
///
/// As [`Registers`] it has registers of 4 and 8 bytes; those of 1 and 2 are reached by [`Region::get`] and [`Region::set`]. An
/// access of 8 bytes to a part that cannot be mapped is split in two by kernels before 6.11.
///
/// Orderings are given by fences of the language, which on x86-64, where device memory is strongly ordered, are all that
/// is needed.
pub struct Region {
    handle: Arc<Handle>,
    index: u32,
    /// Where it begins in the device's file.
    file_offset: u64,
    size: u64,
    readable: bool,
    writable: bool,
    areas: Vec<Area>,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("device", &self.handle.address)
            .field("index", &self.index)
            .field("size", &self.size)
            .field("mapped", &self.areas.len())
            .finish_non_exhaustive()
    }
}

impl Region {
    /// Maps what of it can be mapped: `mappable`, as offsets and sizes.
    pub(crate) fn new(
        handle: Arc<Handle>,
        info: abi::vfio_region_info,
        mappable: &[(u64, u64)],
    ) -> Result<Self, VfioError> {
        let has = |flag| info.flags & flag != 0;
        let mut this = Self {
            index: info.index,
            file_offset: info.offset,
            size: info.size,
            readable: has(abi::VFIO_REGION_INFO_FLAG_READ),
            writable: has(abi::VFIO_REGION_INFO_FLAG_WRITE),
            areas: Vec::new(),
            handle,
        };
        for (offset, size) in mappable {
            let mapping = this.map(*offset, *size)?;
            this.areas.push(Area {
                offset: *offset,
                mapping,
            });
        }
        Ok(this)
    }

    fn map(&self, offset: u64, size: u64) -> Result<MmapRaw, VfioError> {
        let failed = |errno| {
            let on = format!(
                "bytes {offset:#x} to {:#x} of region {} of {}",
                offset.saturating_add(size),
                self.index,
                self.handle.address
            );
            error::call("mmap", on, errno)
        };
        let end = offset.checked_add(size).filter(|end| *end <= self.size);
        let at = self.file_offset.checked_add(offset);
        let (Some(_), Some(at), Ok(len)) = (end, at, usize::try_from(size)) else {
            return Err(failed(libc::EINVAL));
        };
        let mut options = MmapOptions::new();
        options.offset(at).len(len);
        let file = &self.handle.file;
        let mapping = if self.writable {
            options.map_raw(file)
        } else {
            options.map_raw_read_only(file)
        };
        let mapping = mapping.map_err(|error| failed(error.raw_os_error().unwrap_or(0)))?;
        // A child's access would reach the device of its parent.
        let advised = mapping.advise(Advice::DontFork);
        advised.map_err(|error| failed(error.raw_os_error().unwrap_or(0)))?;
        Ok(mapping)
    }

    /// How many bytes of it are mapped; the others are reached by system calls.
    pub fn mapped(&self) -> u64 {
        self.areas
            .iter()
            .map(|area| area.mapping.len() as u64)
            .sum()
    }

    /// Refuses what is no register of the region; finds the place if it is mapped.
    fn place<T: Width>(&self, offset: u64, allowed: bool) -> Result<Option<*mut T>, DeviceError> {
        let width = T::BYTES;
        let end = offset.checked_add(width.into());
        let inside = end.filter(|end| *end <= self.size && offset.is_multiple_of(width.into()));
        let Some(end) = inside.filter(|_| allowed) else {
            return Err(DeviceError::NoRegister { offset, width });
        };
        self.handle.check()?;
        let area = self
            .areas
            .iter()
            .find(|area| area.offset <= offset && end - area.offset <= area.mapping.len() as u64);
        Ok(area.map(|area| {
            let into = (offset - area.offset) as usize;
            // In bounds by what was found.
            area.mapping.as_mut_ptr().wrapping_add(into).cast()
        }))
    }

    /// Reads the register at byte `offset`.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    pub fn get<T: Width>(&self, offset: u64) -> Result<T, DeviceError> {
        let value = match self.place::<T>(offset, self.readable)? {
            // SAFETY: the place lies in a live mapping, readable, with room for the register, aligned as the mapping is to pages and
            // the offset to the width. The process is the one that mapped it. It is device memory: no reference to it exists.
            Some(place) => unsafe { place.read_volatile() }.swapped(),
            None => {
                let mut bytes = [0; 8];
                let bytes_of = &mut bytes[..T::BYTES.into()];
                self.handle
                    .pread(bytes_of, self.file_offset + offset, "pread of a region")?;
                T::load(bytes)
            }
        };
        // Acquire: later loads happen after this read, so that what the device wrote before it set a bit is seen.
        fence(Ordering::Acquire);
        Ok(value)
    }

    /// Writes the register at byte `offset`.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    pub fn set<T: Width>(&self, offset: u64, value: T) -> Result<(), DeviceError> {
        let place = self.place::<T>(offset, self.writable)?;
        // Release: earlier stores are done before a doorbell tells the device of them.
        fence(Ordering::Release);
        match place {
            Some(place) => {
                // SAFETY: as in `get`; the mapping is writable, as the region is.
                unsafe { place.write_volatile(value.swapped()) };
                Ok(())
            }
            None => {
                let bytes = &value.store()[..T::BYTES.into()];
                self.handle
                    .pwrite(bytes, self.file_offset + offset, "pwrite of a region")
            }
        }
    }
}

// Threads share it: of the mappings it has pointers inside `MmapRaw` only, and `place` makes none that outlives a call.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Region>();
};

impl Registers for Region {
    fn len(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        self.get(offset)
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        self.set(offset, value)
    }

    fn read32(&self, offset: u64) -> Result<u32, DeviceError> {
        self.get(offset)
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        self.set(offset, value)
    }
}

impl Handle {
    /// Reads exactly so many bytes of the device's file.
    pub(crate) fn pread(
        &self,
        bytes: &mut [u8],
        at: u64,
        call: &'static str,
    ) -> Result<(), DeviceError> {
        self.check()?;
        let read = self.file.read_at(bytes, at);
        whole(read, bytes.len(), call)
    }

    /// Writes exactly so many bytes of the device's file.
    pub(crate) fn pwrite(
        &self,
        bytes: &[u8],
        at: u64,
        call: &'static str,
    ) -> Result<(), DeviceError> {
        self.check()?;
        let written = self.file.write_at(bytes, at);
        whole(written, bytes.len(), call)
    }
}

/// A register is accessed as a whole or not at all.
fn whole(
    done: std::io::Result<usize>,
    wanted: usize,
    call: &'static str,
) -> Result<(), DeviceError> {
    match done {
        Ok(done) if done == wanted => Ok(()),
        Ok(_) => Err(error::system(call, libc::EIO)),
        Err(error) => Err(error::system(
            call,
            error.raw_os_error().unwrap_or(libc::EIO),
        )),
    }
}
