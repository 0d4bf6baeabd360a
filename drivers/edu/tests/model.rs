//! The driver and its self check over the model, and what the check finds when somebody forgets to cut off.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shootdown::{
    AddressSpace, Cause, Deadlines, DeviceError, DmaWindow, Map, Range, Registers, Rights,
};
use shootdown_edu::{
    Check, CheckError, CheckPorts, Direction, Edu, EduConfig, EduError, self_check,
};
use shootdown_hw_model::edu as model;
use shootdown_hw_model::{Bus, ModelMemory};
use shootdown_vfio::{DmaFault, FaultSource, Iommu, Operation, Reuse, Window, WindowOptions};

/// An IOMMU that unmaps so many times, and then only says so.
struct Forgetful {
    iommu: Arc<model::ModelIommu>,
    unmaps: AtomicU64,
    /// How long it takes for each.
    slowness: Mutex<Duration>,
}

impl Forgetful {
    fn forgets(&self) -> bool {
        self.unmaps.load(SeqCst) == 0
    }
}

impl DmaWindow for Forgetful {
    fn iova_ranges(&self) -> Vec<Range> {
        self.iommu.iova_ranges()
    }
    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        match self.iommu.map(iova, memory, rights) {
            Err(DeviceError::Overlap { .. }) if self.forgets() => Ok(()),
            other => other,
        }
    }
    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        if self.forgets() {
            return Ok(());
        }
        self.unmaps.fetch_sub(1, SeqCst);
        std::thread::sleep(*self.slowness.lock().unwrap());
        self.iommu.unmap(iova)
    }
}

/// Faults of the model, as they come.
struct ModelFaults {
    iommu: Arc<model::ModelIommu>,
    told: AtomicUsize,
}

impl FaultSource for ModelFaults {
    fn take(&self) -> Vec<DmaFault> {
        let faults = self.iommu.faults();
        let told = self.told.swap(faults.len(), SeqCst);
        let new = faults[told..].iter();
        new.map(|one| DmaFault {
            iova: one.iova,
            write: one.write,
        })
        .collect()
    }
}

struct Rig {
    bus: Bus,
    space: AddressSpace,
    device: Arc<model::Edu>,
    endpoint: Arc<Forgetful>,
    iommu: Arc<Iommu>,
}

fn rig(dma_delay: Duration) -> Rig {
    let bus = Bus::new(256).unwrap();
    let memory = ModelMemory::new(&bus, 1 << 24).unwrap();
    let endpoint = Arc::new(Forgetful {
        iommu: model::ModelIommu::new(&bus, &memory, 0),
        unmaps: AtomicU64::new(u64::MAX),
        slowness: Mutex::new(Duration::ZERO),
    });
    let config = model::EduConfig {
        dma_delay,
        ..model::EduConfig::default()
    };
    Rig {
        device: model::Edu::new(&endpoint.iommu, config),
        iommu: Iommu::new(vec![endpoint.clone()], Reuse::Never).unwrap(),
        space: AddressSpace::managed(memory, Deadlines::default()),
        endpoint,
        bus,
    }
}

impl Rig {
    fn ports(&self) -> CheckPorts<'_> {
        CheckPorts {
            registers: self.device.clone(),
            interrupts: self.device.clone(),
            iommu: &self.iommu,
            space: &self.space,
            last: (1 << 40) - 1,
            config: EduConfig::default(),
        }
    }
}

const DELAY: Duration = Duration::from_millis(50);

#[test]
fn the_self_check_passes_and_the_iommu_saw_both_transfers_fault() {
    let rig = rig(DELAY);
    rig.iommu.watch(Arc::new(ModelFaults {
        iommu: rig.endpoint.iommu.clone(),
        told: AtomicUsize::new(0),
    }));
    let report = self_check(&rig.ports());
    assert!(report.passed(), "{report:#?}");
    let of = |check| report.steps.iter().find(|one| one.check == check).unwrap();
    for (check, cause) in [
        (Check::WriteCutOff, Cause::Protect),
        (Check::ReadCutOff, Cause::Unmap),
    ] {
        let fault = of(check).fault.unwrap();
        assert_eq!(fault.operation, Operation::CutOff(cause));
    }
    assert!(of(Check::RoundTrip).fault.is_none());
    let faults = rig.endpoint.iommu.faults();
    assert_eq!(
        faults.iter().map(|one| one.write).collect::<Vec<_>>(),
        [true, false]
    );
    // The window is closed by now, and its IOVA still has a name.
    let found = rig.iommu.attribute(faults[0].iova).unwrap();
    assert_eq!(found.operation, Operation::Closed);
    assert_eq!(rig.bus.oracle().stale_accesses(), 0);
    assert_eq!(rig.space.registrations(), 0);
    assert_eq!(rig.space.quarantined_bytes(), 0);
}

#[test]
fn a_cut_off_that_is_forgotten_fails_the_check_and_the_oracle_saw_it() {
    // The first is for the change of rights; the second, which finds nothing, gives them back; the third is for the unmap.
    for (unmaps, check) in [(0, Check::WriteCutOff), (2, Check::ReadCutOff)] {
        let rig = rig(DELAY);
        rig.endpoint.unmaps.store(unmaps, SeqCst);
        let report = self_check(&rig.ports());
        let last = report.steps.last().unwrap();
        assert_eq!(last.check, check);
        assert!(
            matches!(
                last.result,
                Err(CheckError::Written { word: 0 } | CheckError::Leaked { word: 0 })
            ),
            "{report:#?}"
        );
        assert!(!report.passed());
        assert!(!rig.bus.oracle().findings().is_empty());
    }
}

#[test]
fn a_shootdown_that_is_slower_than_the_device_proves_nothing() {
    let rig = rig(Duration::ZERO);
    *rig.endpoint.slowness.lock().unwrap() = Duration::from_millis(300);
    let report = self_check(&rig.ports());
    let last = report.steps.last().unwrap();
    assert_eq!(last.check, Check::WriteCutOff);
    assert!(
        matches!(last.result, Err(CheckError::TooLate { .. })),
        "{report:#?}"
    );
    assert!(!report.passed());
}

#[test]
fn a_fault_is_attributed_to_window_range_and_last_operation() {
    let rig = rig(DELAY);
    let edu = Edu::probe(rig.device.clone(), rig.device.clone(), EduConfig::default()).unwrap();
    let memory = rig.space.map(Map::anonymous(4 << 12)).unwrap();
    let options = WindowOptions {
        granule: 4096,
        ..WindowOptions::default()
    };
    let window = Window::open(&rig.iommu, &rig.space, memory, edu.clone(), options).unwrap();
    let part = Range::new(memory.start().get() + 0x1800, 64).unwrap();
    let transfer = edu.arm(&window, part, 0, Direction::ToMemory).unwrap();
    let page = Range::new(memory.start().get() + 0x1000, 4096).unwrap();
    rig.space.discard(page).unwrap();
    transfer.wait().unwrap();
    let faults = rig.endpoint.iommu.faults();
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].iova, window.iova_of(part).unwrap().start());
    let found = rig.iommu.attribute(faults[0].iova).unwrap();
    assert_eq!(found.window, window.id());
    assert_eq!(found.memory, memory);
    assert_eq!(found.part, window.iova_of(page).unwrap());
    assert_eq!(found.operation, Operation::CutOff(Cause::Discard));
}

#[test]
fn what_is_no_edu_and_no_transfer_is_refused_by_name() {
    struct Other;
    impl Registers for Other {
        fn len(&self) -> u64 {
            4096
        }
        fn read(&self, offset: u64) -> Result<u64, DeviceError> {
            Err(DeviceError::NoRegister { offset, width: 8 })
        }
        fn write(&self, offset: u64, _: u64) -> Result<(), DeviceError> {
            Err(DeviceError::NoRegister { offset, width: 8 })
        }
        fn read32(&self, _: u64) -> Result<u32, DeviceError> {
            Ok(0x8086_1234)
        }
    }
    let rig = rig(DELAY);
    let refused = Edu::probe(Arc::new(Other), rig.device.clone(), EduConfig::default());
    assert!(matches!(
        refused.err(),
        Some(EduError::NotEdu {
            found: 0x8086_1234,
            ..
        })
    ));
    let edu = Edu::probe(rig.device.clone(), rig.device.clone(), EduConfig::default()).unwrap();
    let memory = rig.space.map(Map::anonymous(4 << 12)).unwrap();
    let options = WindowOptions {
        granule: 4096,
        ..WindowOptions::default()
    };
    let window = Window::open(&rig.iommu, &rig.space, memory, edu.clone(), options).unwrap();
    for (len, buffer) in [(4096, 0), (8, 4090), (8, u64::MAX)] {
        let part = Range::new(memory.start(), len).unwrap();
        let refused = edu.arm(&window, part, buffer, Direction::ToDevice).err();
        assert!(matches!(refused, Some(EduError::Transfer { .. })));
    }
    assert!(rig.endpoint.iommu.faults().is_empty());
}
