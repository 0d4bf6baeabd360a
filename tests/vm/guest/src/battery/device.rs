//! Devices of the transport crate in front of the real kernel: registers, interrupts, resets, and how they are lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{DeviceError, DmaWindow, Interrupts, Rights};
use shootdown_vfio::{Container, Departure, Device, Group, Kind, VfioError, pci};

use super::child;
use super::rig::{SECOND, SIZE, unmapping};
use super::transport::{open, range};
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::edu::{CHUNK, Edu};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function, NVME, RNG};

pub(crate) const CHECKS: &[Check] = &[
    check("device:registers-and-msi-of-edu", registers),
    check("device:an-intx-comes-again-after-it-was-taken", intx),
    check("device:what-it-does-not-have-is-a-typed-error", typed),
    check("device:a-forked-child-is-refused", forked),
    check("device:a-group-in-use-is-typed", in_use),
    check("device:two-groups-share-what-a-container-maps", two_groups),
    check("device:nvme-is-reset-and-edu-has-no-reset", reset),
    check("device:a-hot-reset-names-whom-it-hits", hot_reset),
    check("device:wanted-back-ends-the-wait", wanted_back),
];

const IOVA: u64 = 0x6000_0000;

fn registers() -> Outcome {
    const BITS: u32 = 0x20;
    let (device, _container) = open()?;
    demand!(
        !device.is_bus_master()?,
        "a device that was just opened is bus master"
    );
    // An MSI is a write to memory.
    device.set_bus_master(true)?;
    let irqs = device.interrupts(Kind::Msi, 1)?;
    let region = device.region(0)?;
    demand_eq!(region.mapped(), 1 << 20, "bytes of BAR 0 that are mapped");
    let edu = Edu::new(region)?;
    demand_eq!(edu.liveness(0x1234_5678)?, !0x1234_5678, "liveness");
    demand_eq!(
        irqs.wait(0, Duration::from_millis(20))?,
        0,
        "interrupts before one was raised"
    );
    edu.raise(BITS)?;
    demand_eq!(irqs.wait(0, SECOND)?, 1, "interrupts");
    edu.acknowledge(BITS)?;
    let none = irqs.wait(1, SECOND);
    demand_eq!(
        none,
        Err(DeviceError::NoVector {
            vector: 1,
            vectors: 1
        }),
        "a vector that is not there"
    );
    Ok(())
}

fn forked() -> Outcome {
    let (device, container) = open()?;
    let region = device.region(0)?;
    let memory = Memory::shared(PAGE)?;
    child::run(|| {
        let forked = |found: Result<(), DeviceError>, what: &str| {
            demand!(
                matches!(found, Err(DeviceError::Forked { .. })),
                "{what} in a child: {found:?}"
            );
            Ok(())
        };
        forked(region.get::<u32>(0).map(drop), "a register")?;
        forked(region.set::<u32>(4, 1), "a register's write")?;
        forked(
            container.map(range(IOVA, SIZE), memory.range(), Rights::READ),
            "a map",
        )?;
        forked(container.unmap(range(IOVA, SIZE)), "an unmap")?;
        forked(device.config_get::<u16>(4).map(drop), "configuration space")?;
        let reset = device.set_bus_master(true);
        demand!(
            matches!(reset, Err(VfioError::Device(DeviceError::Forked { .. }))),
            "bus mastering: {reset:?}"
        );
        Ok(())
    })?;
    demand_eq!(
        region.get::<u32>(0)?,
        0x0100_00ed,
        "edu's identification, in the parent"
    );
    Ok(())
}

fn in_use() -> Outcome {
    let (_device, _container) = open()?;
    let number = pci::group(&Function::find(EDU)?.address)?;
    let second = Group::open(number).and_then(|group| Container::open(vec![group]));
    let Err(error) = second else {
        return Err(Failure::NotSo("a second container got the group".into()));
    };
    let busy = matches!(
        error,
        VfioError::Open {
            errno: libc::EBUSY,
            ..
        } | VfioError::Call {
            errno: libc::EBUSY,
            ..
        }
    );
    demand!(busy, "a second container: {error}");
    Ok(())
}

fn reset() -> Outcome {
    /// Controller configuration, and its bit that switches the controller on (NVM Express base specification, 3.1.3.5).
    const CC: u64 = 0x14;
    let (edu, _container) = open()?;
    let refused = edu.reset();
    demand!(
        matches!(refused, Err(VfioError::NoReset { .. })),
        "a reset of edu: {refused:?}"
    );
    let nvme = shootdown_vfio::open(&Function::find(NVME)?.address)?;
    let region = nvme.region(0)?;
    nvme.set_bus_master(true)?;
    // Entry sizes only: it stays off.
    region.set::<u32>(CC, 0x0046_0000)?;
    demand_eq!(region.get::<u32>(CC)?, 0x0046_0000, "CC before the reset");
    nvme.reset()?;
    nvme.set_bus_master(true)?;
    demand_eq!(region.get::<u32>(CC)?, 0, "CC after the reset");
    Ok(())
}

fn wanted_back() -> Outcome {
    let function = Function::find(EDU)?;
    let (device, _container) = open()?;
    let irqs = device.interrupts(Kind::Msi, 1)?;
    let unbinder = {
        let function = function.clone();
        // The kernel holds the writer up until the device is given back.
        std::thread::spawn(move || function.unbind())
    };
    let begun = Instant::now();
    let waited = irqs.wait(0, Duration::from_secs(10));
    let took = begun.elapsed();
    let departure = device.departure();
    drop((irqs, device, _container));
    let unbound = unbinder
        .join()
        .map_err(|_| Failure::Error("the unbinding thread panicked".into()))?;
    function.bind_to_vfio()?;
    unbound?;
    demand!(
        matches!(waited, Err(DeviceError::Gone { .. })),
        "the wait: {waited:?}"
    );
    demand!(
        took < Duration::from_secs(5),
        "the wait went on for {took:?}"
    );
    demand_eq!(departure, Ok(Some(Departure::WantedBack)), "the departure");
    Ok(())
}

fn intx() -> Outcome {
    const BITS: u32 = 0x40;
    let (device, _container) = open()?;
    let irqs = device.interrupts(Kind::Intx, 1)?;
    let edu = Edu::new(device.region(0)?)?;
    demand_eq!(
        irqs.wait(0, Duration::from_millis(20))?,
        0,
        "interrupts before one was raised"
    );
    for round in 0..3 {
        edu.raise(BITS)?;
        // The line stays up until it is acknowledged, and may fire again when it is unmasked.
        demand!(irqs.wait(0, SECOND)? > 0, "no interrupt in round {round}");
        demand_eq!(edu.pending()?, BITS, "pending");
        edu.acknowledge(BITS)?;
        while irqs.wait(0, Duration::from_millis(20))? > 0 {}
    }
    Ok(())
}

fn typed() -> Outcome {
    let (device, _container) = open()?;
    let none = device.interrupts(Kind::MsiX, 1).map(drop);
    demand!(
        matches!(
            none,
            Err(VfioError::NoInterrupts {
                available: 0,
                wanted: 1,
                ..
            })
        ),
        "MSI-X of edu: {none:?}"
    );
    for index in [1, 99] {
        let region = device.region(index).map(drop);
        demand!(
            matches!(region, Err(VfioError::NoRegion { .. })),
            "region {index}: {region:?}"
        );
    }
    let region = device.region(0)?;
    for offset in [1 << 20, 2] {
        let found = region.get::<u32>(offset);
        demand_eq!(
            found,
            Err(DeviceError::NoRegister { offset, width: 4 }),
            "a register"
        );
    }
    let off = device.config_set::<u16>(4, 0);
    demand!(
        matches!(off, Err(VfioError::MemoryOff { .. })),
        "memory switched off: {off:?}"
    );
    let nobody = shootdown_vfio::open("0000:1f:00.0").map(drop);
    demand!(
        matches!(nobody, Err(VfioError::NoDevice { .. })),
        "a device that is not there: {nobody:?}"
    );
    Ok(())
}

fn two_groups() -> Outcome {
    let functions = [Function::find(EDU)?, Function::find(NVME)?];
    let group = |function: &Function| Group::open(pci::group(&function.address)?);
    let groups = functions.iter().map(group).collect::<Result<_, _>>()?;
    let container: Arc<Container> = Container::open(groups)?;
    let edu = Device::open(&container, &functions[0].address)?;
    let _nvme = Device::open(&container, &functions[1].address)?;
    edu.set_bus_master(true)?;
    let edu = Edu::new(edu.region(0)?)?;
    let memory = Memory::anonymous(PAGE)?;
    memory.fill(0x11);
    let iova = range(IOVA, SIZE);
    container.map(iova, memory.range(), Rights::READ_WRITE)?;
    edu.read(IOVA, CHUNK)?;
    memory.fill(0x22);
    edu.write(IOVA, CHUNK)?;
    demand_eq!(memory.differs(0, CHUNK, 0x11), None, "what came back");
    unmapping(&[iova], || container.unmap(iova))?;
    Ok(())
}

fn hot_reset() -> Outcome {
    let function = Function::find(RNG)?;
    let device = shootdown_vfio::open(&function.address)?;
    let reset = device.hot_reset()?;
    let hit: Vec<&str> = reset
        .siblings()
        .iter()
        .map(|one| one.address.as_str())
        .collect();
    demand_eq!(
        hit,
        [function.address.as_str()],
        "whom a reset of its slot hits"
    );
    let (edu, _container) = open()?;
    let none = edu.hot_reset().map(drop);
    demand!(none.is_err(), "a device on the root bus has a hot reset");
    Ok(())
}
