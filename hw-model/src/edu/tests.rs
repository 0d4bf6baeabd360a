use shootdown::{DmaWindow, Memory, PageSize, Range, Rights};

use super::*;
use crate::bus::Bus;
use crate::memory::ModelMemory;

const SECOND: Duration = Duration::from_secs(1);

struct Rig {
    bus: Bus,
    memory: Arc<ModelMemory>,
    iommu: Arc<ModelIommu>,
    edu: Arc<Edu>,
    page: Range,
    iova: Range,
}

/// A device with one page at IOVA 0x10000.
fn rig(dma_delay: Duration) -> Rig {
    let bus = Bus::new(64).unwrap();
    let memory = ModelMemory::new(&bus, 1 << 21).unwrap();
    let page = Range::new(memory.arena().start(), 4096).unwrap();
    memory
        .map(page, PageSize::FourKiB, Rights::READ_WRITE)
        .unwrap();
    let iommu = ModelIommu::new(&bus, &memory, 7);
    let iova = Range::new(0x10000, 4096).unwrap();
    iommu.map(iova, page, Rights::READ_WRITE).unwrap();
    let config = EduConfig {
        dma_delay,
        ..EduConfig::default()
    };
    Rig {
        edu: Edu::new(&iommu, config),
        bus,
        memory,
        iommu,
        page,
        iova,
    }
}

impl Rig {
    fn start(&self, to_memory: bool, iova: u64) {
        let (source, destination) = if to_memory {
            (BUFFER, iova)
        } else {
            (iova, BUFFER)
        };
        for (offset, value) in [
            (register::DMA_SOURCE, source),
            (register::DMA_DESTINATION, destination),
            (register::DMA_COUNT, 8),
            (
                register::DMA_COMMAND,
                DMA_RUN | DMA_INTERRUPT | if to_memory { DMA_TO_MEMORY } else { 0 },
            ),
        ] {
            self.edu.write(offset, value).unwrap();
        }
    }

    fn finish(&self) {
        assert_eq!(self.edu.wait(0, SECOND), Ok(1));
        assert_eq!(
            self.edu.read32(register::INTERRUPT_STATUS),
            Ok(INTERRUPT_DMA)
        );
        self.edu
            .write32(register::INTERRUPT_ACKNOWLEDGE, INTERRUPT_DMA)
            .unwrap();
        assert_eq!(self.edu.read32(register::INTERRUPT_STATUS), Ok(0));
    }

    fn cpu(&self) -> *mut u64 {
        self.page.start().get() as *mut u64
    }
}

#[test]
fn registers_answer_as_the_device_does() {
    let rig = rig(Duration::ZERO);
    let edu = &rig.edu;
    assert_eq!(edu.read32(0), Ok(IDENTIFICATION));
    edu.write32(register::LIVENESS, 0x1234_5678).unwrap();
    assert_eq!(edu.read32(register::LIVENESS), Ok(!0x1234_5678));
    edu.write32(register::STATUS, 0xff).unwrap();
    edu.write32(register::FACTORIAL, 5).unwrap();
    assert_eq!(edu.read32(register::FACTORIAL), Ok(120));
    assert_eq!(edu.wait(0, SECOND), Ok(1));
    assert_eq!(
        edu.read(register::LIVENESS & !7),
        Err(DeviceError::NoRegister {
            offset: 0,
            width: 8
        })
    );
    assert!(edu.read32(2).is_err() && edu.read32(WINDOW_BYTES).is_err());
}

#[test]
fn a_transfer_goes_both_ways() {
    let rig = rig(Duration::from_millis(5));
    // SAFETY: the page is mapped, and only this thread and the device use it.
    unsafe { rig.cpu().write_volatile(42) };
    rig.start(false, rig.iova.start().get());
    rig.finish();
    // SAFETY: as above.
    unsafe { rig.cpu().write_volatile(0) };
    rig.start(true, rig.iova.start().get());
    rig.finish();
    // SAFETY: as above.
    assert_eq!(unsafe { rig.cpu().read_volatile() }, 42);
    assert_eq!(rig.bus.oracle().stale_accesses(), 0);
    assert!(rig.iommu.faults().is_empty());
}

#[test]
fn what_is_unmapped_between_doorbell_and_transfer_faults() {
    let rig = rig(Duration::from_millis(50));
    rig.start(true, rig.iova.start().get());
    rig.iommu.unmap(rig.iova).unwrap();
    rig.memory.unmap(rig.page).unwrap();
    rig.finish();
    assert_eq!(
        rig.iommu.faults(),
        [IommuFault {
            iova: rig.iova.start(),
            write: true
        }]
    );
    assert_eq!(rig.bus.oracle().stale_accesses(), 0);
}

#[test]
fn what_is_not_cut_off_hits_a_frame_that_is_somebody_elses() {
    let rig = rig(Duration::from_millis(50));
    rig.start(true, rig.iova.start().get());
    rig.memory.unmap(rig.page).unwrap();
    rig.finish();
    assert_eq!(rig.bus.oracle().stale_accesses(), 1);
}

#[test]
fn writes_while_it_runs_are_ignored() {
    let rig = rig(Duration::from_millis(50));
    rig.start(false, rig.iova.start().get());
    rig.start(true, 0xdead_0000);
    assert_eq!(
        rig.edu.read(register::DMA_SOURCE),
        Ok(rig.iova.start().get())
    );
    rig.finish();
    assert!(rig.iommu.faults().is_empty());
    assert_eq!(rig.edu.wait(0, Duration::from_millis(100)), Ok(0));
}

#[test]
fn mappings_are_refused_as_the_kernel_refuses_them() {
    let rig = rig(Duration::ZERO);
    let iova = |start: u64, len| Range::new(start, len).unwrap();
    let rights = Rights::READ_WRITE;
    let overlap = rig.iommu.map(rig.iova, rig.page, rights);
    assert_eq!(overlap, Err(DeviceError::Overlap { iova: rig.iova }));
    let hole = Range::new(rig.page.start().get() + 4096, 4096).unwrap();
    assert!(matches!(
        rig.iommu.map(iova(0x20000, 4096), hole, rights),
        Err(DeviceError::Unbacked { .. })
    ));
    rig.memory.map(hole, PageSize::FourKiB, rights).unwrap();
    let two = rig.page.hull(hole);
    rig.iommu.map(iova(0x20000, 8192), two, rights).unwrap();
    assert!(matches!(
        rig.iommu.unmap(iova(0x20000, 4096)),
        Err(DeviceError::Cut { .. })
    ));
    rig.iommu.unmap(iova(0x10000, 0x20000)).unwrap();
    assert_eq!(
        rig.iommu.unmap(rig.iova),
        Err(DeviceError::NotMapped { iova: rig.iova })
    );
}
