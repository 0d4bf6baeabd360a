//! The driver, behind DMA windows, before the conformance kit. It has no TLB and no reset: what takes pages away from it is the cut-off.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use conformance::{
    Access, Asked, Driver, Failure, Fault, Hardware, Kit, Reach, Rule, Session, Setup,
};
use shootdown::{Addr, AddressSpace, DeviceError, DmaWindow, Map, Range, Rights, SpacePin};
use shootdown_edu::{Direction, Edu, EduConfig, EduError};
use shootdown_hw_model::edu as model;
use shootdown_vfio::{Iommu, Reuse, Window, WindowError, WindowOptions};

#[global_allocator]
static WATCHED: conformance::Watched = conformance::Watched;

const PAGE: u64 = 4096;

/// The device, and the IOMMU that it is behind.
struct Machine {
    endpoint: Arc<model::ModelIommu>,
    device: Arc<model::Edu>,
}

impl Hardware for Machine {
    /// It has nothing to acknowledge.
    const FAULTS: &'static [Fault] = &[];

    fn build(setup: &Setup) -> Result<Self, Failure> {
        let endpoint = model::ModelIommu::new(&setup.bus, &setup.memory, 0);
        let config = model::EduConfig {
            dma_delay: Duration::from_micros(100),
            ..model::EduConfig::default()
        };
        let device = model::Edu::new(&endpoint, config);
        Ok(Self { endpoint, device })
    }

    fn reach(&self, _: u64, part: Range) -> Option<Reach> {
        let page = self.endpoint.maps(part)?;
        Some(Reach::Entry {
            page,
            asked: Asked::Unknown,
        })
    }
}

/// An endpoint that says that it has unmapped, and has not.
struct Forgetful(Arc<model::ModelIommu>);

impl DmaWindow for Forgetful {
    fn iova_ranges(&self) -> Vec<Range> {
        self.0.iova_ranges()
    }
    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        match self.0.map(iova, memory, rights) {
            Err(DeviceError::Overlap { .. }) => Ok(()),
            other => other,
        }
    }
    fn unmap(&self, _: Range) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct OnEdu {
    edu: Arc<Edu>,
    iommu: Arc<Iommu>,
}

impl OnEdu {
    fn probe(machine: Arc<Machine>) -> Result<Self, Failure> {
        let endpoint = Arc::clone(&machine.endpoint);
        Self::behind(&machine, endpoint)
    }

    fn behind(machine: &Machine, endpoint: Arc<dyn DmaWindow>) -> Result<Self, Failure> {
        let device = &machine.device;
        Ok(Self {
            edu: Edu::probe(device.clone(), device.clone(), EduConfig::default())?,
            iommu: Iommu::new(vec![endpoint], Reuse::Never)?,
        })
    }

    fn window(&self, space: &AddressSpace, memory: Range) -> Result<Window, WindowError> {
        let options = WindowOptions {
            granule: PAGE,
            ..WindowOptions::default()
        };
        Window::open(&self.iommu, space, memory, self.edu.clone(), options)
    }
}

impl Driver for OnEdu {
    type Hardware = Machine;
    type Session = OnWindow;

    fn open(&self, space: &AddressSpace, data: Range) -> Result<OnWindow, Failure> {
        let values = space.map(Map::anonymous(PAGE))?;
        Ok(OnWindow {
            space: space.pin(),
            edu: Arc::clone(&self.edu),
            data: self.window(space, data)?,
            values: Mutex::new(self.window(space, values)?),
        })
    }
}

/// A window on the data, and one on a page that values come from.
struct OnWindow {
    space: SpacePin,
    edu: Arc<Edu>,
    data: Window,
    /// Locked from the transfer of a value into the device to the transfer out of it, as the device has one buffer.
    values: Mutex<Window>,
}

impl OnWindow {
    fn transfer(
        &self,
        window: &Window,
        part: Range,
        direction: Direction,
    ) -> Result<Access, Failure> {
        match self.edu.arm(window, part, 0, direction) {
            Ok(transfer) => transfer.wait()?,
            Err(EduError::Window(WindowError::Device(DeviceError::Unbacked { .. }))) => {
                return Ok(Access::Fault);
            }
            Err(EduError::Window(WindowError::Fault(shootdown::FaultError::Gone { .. }))) => {
                return Ok(Access::Lost);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Access::Done)
    }
}

impl Session for OnWindow {
    fn write(&self, at: Addr, value: u64) -> Result<Access, Failure> {
        if self.space.is_exiting() {
            return Ok(Access::Lost);
        }
        let part = Range::new(at, 8)?;
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let from = values.memory().start();
        // SAFETY: the page was mapped by `open`, goes with the space, which the kit ends when nobody writes, and is locked.
        unsafe { (from.get() as *mut u64).write_volatile(value) };
        let fetched = self.transfer(&values, Range::new(from, 8)?, Direction::ToDevice)?;
        if fetched != Access::Done {
            return Ok(fetched);
        }
        let said = self.transfer(&self.data, part, Direction::ToMemory)?;
        // A transfer that is cut off ends as any other: the device does not tell, and its user looks.
        Ok(said)
    }

    fn start(&self, part: Range) -> Result<(), Failure> {
        let part = Range::new(part.start(), PAGE / 2)?;
        // Nobody waits for it here; the next transfer does.
        drop(self.edu.arm(&self.data, part, 0, Direction::ToMemory)?);
        Ok(())
    }

    fn settle(&self) -> Result<(), Failure> {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let own = Range::new(values.memory().start(), 8)?;
        self.transfer(&values, own, Direction::ToDevice)?;
        Ok(())
    }
}

#[test]
fn it_conforms() {
    let report = conformance::run(OnEdu::probe);
    report.assert();
    println!("{report}");
}

#[test]
fn a_cut_off_that_is_forgotten_is_found() {
    let report = Kit::new().run(|machine: Arc<Machine>| {
        let forgetful = Arc::new(Forgetful(Arc::clone(&machine.endpoint)));
        OnEdu::behind(&machine, forgetful)
    });
    assert!(report.rules().contains(&Rule::Flush), "{report}");
}
