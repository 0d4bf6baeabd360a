//! An IOMMU without a device TLB: what is mapped is translated, everything else faults.
//!
//! As VFIO does, it takes the frames when a range is mapped, and keeps them whatever becomes of the range. Other than with
//! VFIO nothing pins them: a device that is not cut off in time hits whatever the frame holds by then, and the oracle sees
//! it. Accesses happen under the table's lock, so that an unmap waits for those in flight.

use std::collections::HashMap;

use shootdown::{Addr, DeviceError, DmaWindow, Frame, Memory, PageSize, Range, Rights};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::Bus;
use crate::memory::ModelMemory;
use crate::oracle::{Access, Stamp};

/// An access that was translated to nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IommuFault {
    /// The IOVA of the first byte that faulted.
    pub iova: Addr,
    /// Whether the device wrote.
    pub write: bool,
}

#[derive(Clone, Copy)]
struct Entry {
    frame: Frame,
    addr: Addr,
    rights: Rights,
    stamp: Stamp,
    /// The IOVAs that were mapped together with it.
    granule: Range,
}

struct Table {
    entries: HashMap<u64, Entry>,
    faults: Vec<IommuFault>,
}

/// Translates the accesses of the devices behind it.
pub struct ModelIommu {
    bus: Bus,
    memory: Arc<ModelMemory>,
    device: u32,
    table: Mutex<Table>,
}

/// Pages that can be mapped.
const PAGES: usize = 1 << 16;
/// Faults that are kept.
const FAULTS: usize = 1024;

fn page_of(addr: Addr) -> u64 {
    addr.get() >> PageSize::FourKiB.shift()
}

impl ModelIommu {
    /// An IOMMU that maps pages of `memory`, with one device behind it, called `device` in findings.
    pub fn new(bus: &Bus, memory: &Arc<ModelMemory>, device: u32) -> Arc<Self> {
        Arc::new(Self {
            bus: bus.clone(),
            memory: memory.clone(),
            device,
            table: Mutex::new(Table {
                // Twice what is used: then no insertion moves it to a larger one under the lock.
                entries: HashMap::with_capacity(2 * PAGES),
                faults: Vec::with_capacity(FAULTS),
            }),
        })
    }

    /// The first faults that happened.
    pub fn faults(&self) -> Vec<IommuFault> {
        let table = self.lock();
        let mut faults = Vec::with_capacity(FAULTS);
        faults.extend(&table.faults);
        faults
    }

    /// A page of `part` of the memory that something is mapped to, if there is one.
    pub fn maps(&self, part: Range) -> Option<Range> {
        let table = self.lock();
        let mut pages = table
            .entries
            .values()
            .map(|entry| Range::page(entry.addr, PageSize::FourKiB));
        pages.find(|page| page.overlaps(part))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Entries are whole at any time.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `access` for each page of `len` bytes from `iova` on that is translated, with its place in the transfer; the others
    /// fault, each once.
    fn each(
        &self,
        iova: Addr,
        len: usize,
        write: bool,
        mut access: impl FnMut(&Access, std::ops::Range<usize>),
    ) {
        let needed = if write { Rights::WRITE } else { Rights::READ };
        let mut table = self.lock();
        let mut done = 0;
        while done < len {
            let at = Addr::new(iova.get().wrapping_add(done as u64));
            let offset = at.get() % PageSize::FourKiB.bytes();
            let part = (len - done).min((PageSize::FourKiB.bytes() - offset) as usize);
            let entry = table.entries.get(&page_of(at)).copied();
            match entry.filter(|entry| entry.rights.contains(needed)) {
                Some(entry) => access(
                    &Access {
                        device: self.device,
                        context: 0,
                        space: self.memory.id(),
                        addr: Addr::new(entry.addr.get() + offset),
                        len: part as u32,
                        write,
                        frame: entry.frame,
                        stamp: entry.stamp,
                    },
                    done..done + part,
                ),
                None if table.faults.len() < FAULTS => {
                    table.faults.push(IommuFault { iova: at, write });
                }
                None => {}
            }
            done += part;
        }
    }

    /// A device reads. What faults reads as zero.
    pub(super) fn read(&self, iova: Addr, into: &mut [u8]) {
        into.fill(0);
        self.each(iova, into.len(), false, |access, part| {
            self.bus.read(access, &mut into[part]);
        });
    }

    /// A device writes. What faults is lost.
    pub(super) fn write(&self, iova: Addr, from: &[u8]) {
        self.each(iova, from.len(), true, |access, part| {
            self.bus.write(access, &from[part]);
        });
    }
}

/// The pages of a range, as numbers.
fn pages(range: Range) -> std::ops::RangeInclusive<u64> {
    page_of(range.start())..=page_of(range.last())
}

impl DmaWindow for ModelIommu {
    fn iova_ranges(&self) -> Vec<Range> {
        let top = Range::inclusive(0, (1_u64 << 48) - 1);
        vec![top.expect("a range of 2^48 bytes")]
    }

    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        let page = PageSize::FourKiB;
        let inside = iova.last().get() < 1 << 48;
        if iova.len() != memory.len()
            || !iova.is_aligned(page)
            || !memory.is_aligned(page)
            || !inside
        {
            return Err(DeviceError::Misaligned {
                iova,
                memory,
                page: page.bytes(),
            });
        }
        let mut table = self.lock();
        if pages(iova).any(|page| table.entries.contains_key(&page)) {
            return Err(DeviceError::Overlap { iova });
        }
        if table.entries.len() as u64 + iova.pages(page) > PAGES as u64 {
            return Err(DeviceError::OutOfMappings {
                iova,
                limit: PAGES as u64,
            });
        }
        let entry = |page: u64| {
            let addr = Addr::new(page << PageSize::FourKiB.shift());
            let found = self.memory.translate(addr)?;
            let into = page - page_of(found.page.start());
            found.rights.contains(rights).then(|| Entry {
                frame: Frame(found.frame.0 + into),
                addr,
                rights,
                stamp: self.bus.oracle().stamp(self.memory.id(), addr),
                granule: iova,
            })
        };
        let unbacked = DeviceError::Unbacked { iova, memory };
        if pages(memory).any(|page| entry(page).is_none()) {
            return Err(unbacked);
        }
        for (to, from) in pages(iova).zip(pages(memory)) {
            if let Some(entry) = entry(from) {
                table.entries.insert(to, entry);
            }
        }
        Ok(())
    }

    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        let mut table = self.lock();
        for edge in [iova.start(), iova.last()] {
            let granule = table.entries.get(&page_of(edge)).map(|entry| entry.granule);
            if let Some(mapping) = granule.filter(|granule| !iova.contains(*granule)) {
                return Err(DeviceError::Cut { iova, mapping });
            }
        }
        let before = table.entries.len();
        for page in pages(iova) {
            table.entries.remove(&page);
        }
        if table.entries.len() == before {
            return Err(DeviceError::NotMapped { iova });
        }
        Ok(())
    }
}
