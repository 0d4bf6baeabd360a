//! The device drivers over VFIO: their self checks, and what only a slow disk can show.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, Deadlines, DmaWindow, Map, ProcessMemory, Target};
use shootdown_edu::{CheckError, CheckPorts, EduConfig};
use shootdown_nvme::{Direction, Nvme, NvmeConfig, NvmeError, NvmePorts};
use shootdown_vfio::{Container, Device, FunctionReset, Iommu, Kind, Reuse, WindowOptions};
use shootdown_vm::protocol::Line;

use super::between::{Between, Telling};
use super::rig::{Rig, SIZE, iova, page, race, unmapping};
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::memory::{PAGE, View};
use crate::pci::{Function, NVME};
use crate::port::say;

pub(crate) const CHECKS: &[Check] = &[
    check("edu:the-drivers-self-check", edu),
    check("nvme:the-drivers-self-check", nvme),
    check("nvme:reads-that-do-not-drain-are-ended-by-a-reset", slow),
];

/// In this one guest and witness must both fail.
pub(crate) const CONTROL: &[Check] = &[check(
    "control:edus-self-check-over-an-iommu-that-lies",
    edu_control,
)];

fn edu() -> Outcome {
    let mut telling = None;
    let rig = Rig::with(Reuse::Late, |container| {
        telling.insert(Telling::new(container)).clone()
    })?;
    let telling = telling.expect("the rig has asked for it");
    race(|| {
        let checked = edu_check(&rig)?;
        // What was unmapped is what the driver had armed DMA to.
        let announce = if checked.is_some() {
            Line::Faults
        } else {
            Line::MayFault
        };
        for range in telling.take_unmapped() {
            say(&announce(rig.function.requester(), iova(range)));
        }
        Ok(checked)
    })
}

fn edu_control() -> Outcome {
    let mut between = None;
    let rig = Rig::with(Reuse::Late, |container| {
        Telling::new(between.insert(Between::new(container)).clone())
    })?;
    let between = between.expect("the rig has asked for it");
    between.lie(true);
    let checked = race(|| edu_check(&rig));
    between.lie(false);
    checked
}

/// `None`: the shootdown took longer than the device waits, which proves nothing.
fn edu_check(rig: &Rig) -> Result<Option<()>, Failure> {
    let report = shootdown_edu::self_check(&CheckPorts {
        registers: Arc::new(rig.device.region(0)?),
        interrupts: Arc::new(rig.device.interrupts(Kind::Msi, 1)?),
        iommu: &rig.iommu,
        space: &rig.space,
        last: (1 << 40) - 1,
        config: EduConfig::default(),
    });
    for step in &report.steps {
        let name = step.check.name();
        match &step.result {
            Ok(()) => say(&Line::Note(format!("edu: {name}: {:?}", step.took))),
            Err(CheckError::TooLate { .. }) => return Ok(None),
            Err(error) => return Err(Failure::NotSo(format!("{name}: {error}"))),
        }
    }
    demand!(report.passed(), "no step was made");
    Ok(Some(()))
}

/// What the NVMe driver needs of a controller, and whatever `endpoint` makes of its container.
fn ports<E: DmaWindow + 'static>(
    function: &Function,
    deadlines: Deadlines,
    endpoint: impl FnOnce(Arc<Container>) -> Arc<E>,
) -> Result<(NvmePorts, Arc<Device>), Failure> {
    let device = Arc::new(shootdown_vfio::open(&function.address)?);
    device.set_bus_master(true)?;
    let container = device.container().expect("it was opened with one").clone();
    let reset = FunctionReset::new(device.clone());
    let ports = NvmePorts {
        registers: Arc::new(device.region(0)?),
        interrupts: Arc::new(device.interrupts(Kind::MsiX, 1)?),
        iommu: Iommu::new(vec![endpoint(container)], Reuse::Never)?,
        space: AddressSpace::managed(Arc::new(ProcessMemory::reserve(64 << 20)?), deadlines),
        targets: vec![Target {
            device: shootdown::Device::new("nvme", reset),
            tag: 0,
        }],
    };
    Ok((ports, device))
}

fn nvme() -> Outcome {
    let (ports, _device) = ports(&Function::find(NVME)?, Deadlines::default(), Telling::new)?;
    let report = shootdown_nvme::self_check(&ports, NvmeConfig::default(), true);
    for step in &report.steps {
        let name = step.check.name();
        match &step.result {
            Ok(()) => say(&Line::Note(format!("nvme: {name}: {:?}", step.took))),
            Err(error) => return Err(Failure::NotSo(format!("{name}: {error}"))),
        }
    }
    demand!(report.passed(), "no step was made");
    Ok(())
}

/// The second controller's disk does four requests a second: a read behind others is in flight for long.
fn slow() -> Outcome {
    const DRAIN: Duration = Duration::from_millis(50);
    let deadlines = Deadlines {
        drain: DRAIN,
        ..Deadlines::default()
    };
    let function = Function::nth(NVME, 1)?;
    let (ports, device) = ports(&function, deadlines, |container| container)?;
    let space = ports.space.clone();
    let nvme = Nvme::probe(ports, NvmeConfig::default())?;
    let memory = space.map(Map::anonymous(4 * SIZE))?;
    // SAFETY: mapped by this check, with all rights, as long as the value is used; no reference to it exists.
    let view = |nth| unsafe { View::of(page(memory, nth)) };
    let window = nvme.window(
        memory,
        WindowOptions {
            granule: SIZE,
            ..WindowOptions::default()
        },
    )?;
    // The first ones are free, as the disk has not done any yet.
    let ahead: Vec<_> = (0..10)
        .map(|_| nvme.submit(&window, page(memory, 0), 0, Direction::Read))
        .collect::<Result<_, _>>()?;
    let changed = page(memory, 1);
    view(1).fill(0x5a);
    let read = nvme.submit(&window, changed, 0, Direction::Read)?;
    let begun = Instant::now();
    unmapping(&[window.iova_of(changed)?], || space.discard(changed))?;
    let took = begun.elapsed();
    demand!(
        took >= DRAIN,
        "the shootdown took {took:?} only: the read was not in flight"
    );
    let ended = read.wait();
    demand!(
        matches!(ended, Err(NvmeError::Reset)),
        "the read in flight: {ended:?}"
    );
    demand_eq!(space.quarantined_bytes(), 0, "bytes in quarantine");
    drop(ahead);
    device.set_bus_master(true)?;
    nvme.restart()?;
    view(2).fill(0x5a);
    nvme.submit(&window, page(memory, 2), 0, Direction::Read)?
        .wait()?;
    demand_eq!(
        view(2).differs(0, PAGE, 0),
        None,
        "what the empty disk reads as"
    );
    Ok(())
}
