//! The bus: how a device reaches memory, and where the oracle looks on.
//!
//! An access names a *frame*, found in the device's TLB; the virtual address comes along only so that the oracle can
//! judge. A stale access is therefore really performed, on whatever that frame holds now: reads return somebody
//! else's data and writes destroy it. That is the point of the model: what goes wrong on hardware goes wrong here.

use std::sync::Arc;

use shootdown::Rights;

use crate::error::ModelError;
use crate::oracle::{Access, Oracle};
use crate::physical::{FRAME_BYTES, Physical};

/// Physical memory with an oracle that sees each access to it. A clone is the same bus.
///
/// Accesses take no lock, do not wait and do not allocate, except to record a finding. They may be made from any thread.
#[derive(Clone)]
pub struct Bus {
    physical: Arc<Physical>,
    oracle: Arc<Oracle>,
}

impl Bus {
    /// A bus with `frames` frames of 4 KiB. May wait (system calls).
    ///
    /// # Errors
    /// As [`Physical::new`].
    pub fn new(frames: u64) -> Result<Self, ModelError> {
        Ok(Self {
            physical: Physical::new(frames)?,
            oracle: Arc::new(Oracle::new()),
        })
    }

    /// The memory.
    pub fn physical(&self) -> &Arc<Physical> {
        &self.physical
    }

    /// The oracle.
    pub fn oracle(&self) -> &Arc<Oracle> {
        &self.oracle
    }

    /// Reads `access.len` bytes. Needs the right to read. From a frame that does not exist all bits are ones, as from a bus on
    /// which nobody answers.
    ///
    /// # Panics
    /// When `into` is not `access.len` bytes long, the access passes the end of its 4 KiB page, or `access.write` is set:
    /// the device is at fault, not its driver.
    pub fn read(&self, access: &Access, into: &mut [u8]) {
        let offset = check(access, into.len(), false);
        if !self.physical.has(access.frame) {
            into.fill(0xff);
            return self.oracle.no_such_frame(access);
        }
        self.oracle.watch(access, Rights::READ, || {
            self.physical.read(access.frame, offset, into);
        });
    }

    /// Writes `access.len` bytes. Needs the right to write. To a frame that does not exist nothing is written.
    ///
    /// # Panics
    /// As [`Bus::read`], but `access.write` must be set.
    pub fn write(&self, access: &Access, from: &[u8]) {
        let offset = check(access, from.len(), true);
        if !self.physical.has(access.frame) {
            return self.oracle.no_such_frame(access);
        }
        self.oracle.watch(access, Rights::WRITE, || {
            self.physical.write(access.frame, offset, from);
        });
    }

    /// Replaces the 1, 2, 4 or 8 bytes (`access.len`) by what `op` makes of them, or leaves them for `None`, atomically for
    /// devices and CPUs: what was there before. `op` sees the value in the low bits, may be called several times, and must
    /// not make an access itself. Needs the right to read and to write. In a frame that does not exist all bits are ones.
    ///
    /// # Panics
    /// As [`Bus::write`], and when the address is not a multiple of the width.
    pub fn atomic(&self, access: &Access, op: &mut dyn FnMut(u64) -> Option<u64>) -> u64 {
        let width = access.len as usize;
        let offset = check(access, width, true);
        if !self.physical.has(access.frame) {
            self.oracle.no_such_frame(access);
            return u64::MAX >> (64 - 8 * width.clamp(1, 8));
        }
        self.oracle.watch(access, Rights::READ_WRITE, || {
            self.physical.update(access.frame, offset, width, op)
        })
    }

    /// [`Bus::read`] through no translation: the address is one of memory itself. There is nothing then that could be stale, and
    /// the space and the stamp say nothing; an access to a frame that nobody has is wrong all the same.
    ///
    /// # Panics
    /// As [`Bus::read`].
    pub fn read_unmapped(&self, access: &Access, into: &mut [u8]) {
        let offset = check(access, into.len(), false);
        if self.is_owned(access) {
            self.physical.read(access.frame, offset, into);
        } else {
            into.fill(0xff);
        }
    }

    /// [`Bus::write`] through no translation, as [`Bus::read_unmapped`].
    ///
    /// # Panics
    /// As [`Bus::write`].
    pub fn write_unmapped(&self, access: &Access, from: &[u8]) {
        let offset = check(access, from.len(), true);
        if self.is_owned(access) {
            self.physical.write(access.frame, offset, from);
        }
    }

    /// [`Bus::atomic`] through no translation, as [`Bus::read_unmapped`].
    ///
    /// # Panics
    /// As [`Bus::atomic`].
    pub fn atomic_unmapped(&self, access: &Access, op: &mut dyn FnMut(u64) -> Option<u64>) -> u64 {
        let width = access.len as usize;
        let offset = check(access, width, true);
        if self.is_owned(access) {
            return self.physical.update(access.frame, offset, width, op);
        }
        u64::MAX >> (64 - 8 * width.clamp(1, 8))
    }

    /// Whether there is such a frame, and it is not free. If not, that is recorded, and nothing is accessed.
    fn is_owned(&self, access: &Access) -> bool {
        if !self.physical.has(access.frame) {
            self.oracle.no_such_frame(access);
            return false;
        }
        self.oracle
            .watch_unmapped(access, self.physical.is_used(access.frame))
    }
}

/// Where in its frame the access begins.
fn check(access: &Access, len: usize, write: bool) -> usize {
    let offset = (access.addr.get() % FRAME_BYTES) as usize;
    assert!(
        access.len as usize == len && offset + len <= FRAME_BYTES as usize && access.write == write,
        "device {} made an access that no bus carries: {access:?} with {len} bytes",
        access.device
    );
    offset
}

#[cfg(test)]
mod tests {
    use shootdown::{Addr, Frame, Memory, PageSize, Range};

    use super::*;
    use crate::memory::ModelMemory;
    use crate::oracle::FindingKind;

    /// A bus, a space with one page, and the access of a device that has an entry for it.
    fn one_page(rights: Rights) -> (Bus, Arc<ModelMemory>, Access) {
        let bus = Bus::new(64).unwrap();
        let memory = ModelMemory::new(&bus, 1 << 21).unwrap();
        let page = Range::new(memory.arena().start(), 4096).unwrap();
        memory.map(page, PageSize::FourKiB, rights).unwrap();
        let addr = Addr::new(page.start().get() + 8);
        let access = Access {
            device: 0,
            context: 0,
            space: memory.id(),
            addr,
            len: 8,
            write: true,
            frame: memory.translate(addr).unwrap().frame,
            stamp: bus.oracle().stamp(memory.id(), addr),
        };
        (bus, memory, access)
    }

    #[test]
    fn a_device_and_the_cpu_see_the_same_memory() {
        let (bus, _memory, access) = one_page(Rights::READ_WRITE);
        let cpu = access.addr.get() as *mut u64;
        bus.write(&access, &7_u64.to_ne_bytes());
        // SAFETY: the page is mapped for reading and writing, and only this thread uses it.
        unsafe {
            assert_eq!(cpu.read_volatile(), 7);
            cpu.write_volatile(8);
        }
        let mut bytes = [0; 8];
        bus.read(
            &Access {
                write: false,
                ..access
            },
            &mut bytes,
        );
        assert_eq!(u64::from_ne_bytes(bytes), 8);
        assert_eq!(bus.oracle().stale_accesses(), 0);
    }

    #[test]
    fn no_increment_of_a_device_is_lost_beside_those_of_a_cpu() {
        let (bus, _memory, access) = one_page(Rights::READ_WRITE);
        const EACH: u64 = 20_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: the page stays mapped; this is the process's own, atomic view of it.
                let cpu = unsafe {
                    std::sync::atomic::AtomicU64::from_ptr(access.addr.get() as *mut u64)
                };
                for _ in 0..EACH {
                    // Relaxed: only the sum counts.
                    cpu.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            });
            for _ in 0..EACH {
                bus.atomic(&access, &mut |old| Some(old + 1));
            }
        });
        assert_eq!(bus.atomic(&access, &mut |_| None), 2 * EACH);
        assert_eq!(bus.oracle().stale_accesses(), 0);
    }

    #[test]
    fn an_atomic_access_needs_both_rights() {
        let (bus, _memory, access) = one_page(Rights::WRITE);
        bus.write(&access, &[0; 8]);
        assert_eq!(bus.oracle().stale_accesses(), 0);
        bus.atomic(&access, &mut |_| None);
        assert_eq!(bus.oracle().findings()[0].kind, FindingKind::Rights);
    }

    #[test]
    fn a_frame_that_does_not_exist_reads_as_ones_and_is_a_finding() {
        let (bus, _memory, access) = one_page(Rights::READ_WRITE);
        let wild = Access {
            frame: Frame(1 << 40),
            len: 4,
            ..access
        };
        let mut bytes = [0; 4];
        bus.read(
            &Access {
                write: false,
                ..wild
            },
            &mut bytes,
        );
        bus.write(&wild, &bytes);
        assert_eq!(bytes, [0xff; 4]);
        assert_eq!(bus.atomic(&wild, &mut |_| Some(0)), 0xffff_ffff);
        let kinds: Vec<_> = bus
            .oracle()
            .findings()
            .iter()
            .map(|found| found.kind)
            .collect();
        assert_eq!(kinds, [FindingKind::NoFrame; 3]);
    }

    #[test]
    fn an_unmapped_access_reaches_a_frame_that_somebody_has_and_no_other() {
        let (bus, memory, access) = one_page(Rights::READ_WRITE);
        let access = Access { space: 0, ..access };
        bus.write_unmapped(&access, &7_u64.to_ne_bytes());
        assert_eq!(bus.atomic_unmapped(&access, &mut |old| Some(old + 1)), 7);
        let mut bytes = [0; 8];
        let read = Access {
            write: false,
            ..access
        };
        bus.read_unmapped(&read, &mut bytes);
        assert_eq!(u64::from_ne_bytes(bytes), 8);
        assert_eq!(bus.oracle().stale_accesses(), 0);
        drop(memory);
        bus.read_unmapped(&read, &mut bytes);
        assert_eq!(bytes, [0xff; 8]);
        assert_eq!(bus.oracle().findings()[0].kind, FindingKind::FreeFrame);
    }

    #[test]
    #[should_panic(expected = "no bus carries")]
    fn an_access_does_not_pass_its_page() {
        let (bus, _memory, access) = one_page(Rights::READ_WRITE);
        let addr = Addr::new(access.addr.get() | 0xffc);
        bus.write(&Access { addr, ..access }, &[0; 8]);
    }
}
