//! What has to be there before anything else can be proven.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::check::{Check, Outcome, demand};
use crate::pci::Function;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "devices-are-handed-to-vfio-and-their-groups-appear",
        run: groups,
    },
    Check {
        name: "vfio-speaks-api-0-and-type1-v2",
        run: version,
    },
];

/// QEMU's edu.
pub(crate) const EDU: (u16, u16) = (0x1234, 0x11e8);
/// QEMU's NVMe controller.
pub(crate) const NVME: (u16, u16) = (0x1b36, 0x0010);
/// QEMU's virtio entropy device, which has an ATS cache here.
pub(crate) const RNG: (u16, u16) = (0x1af4, 0x1044);

fn groups() -> Outcome {
    for (vendor, device) in [EDU, NVME, RNG] {
        let function = Function::find(vendor, device)?;
        function.bind_to_vfio()?;
        let driver = function.driver()?;
        demand!(
            driver.as_deref() == Some("vfio-pci"),
            "{}: driver is {driver:?}",
            function.address
        );
        let group = format!("/dev/vfio/{}", function.group()?);
        demand!(
            Path::new(&group).exists(),
            "{}: no {group}",
            function.address
        );
    }
    Ok(())
}

fn version() -> Outcome {
    const API_VERSION: u64 = 0x3b64;
    const CHECK_EXTENSION: u64 = 0x3b65;
    const TYPE1_V2: u64 = 3;
    let vfio = File::options()
        .read(true)
        .write(true)
        .open("/dev/vfio/vfio")?;
    let ask = |request, argument: u64| {
        // SAFETY: both requests take a number, not a pointer.
        unsafe { libc::ioctl(vfio.as_raw_fd(), request, argument) }
    };
    let (version, v2) = (ask(API_VERSION, 0), ask(CHECK_EXTENSION, TYPE1_V2));
    demand!(version == 0, "API version {version}");
    demand!(v2 == 1, "type1 v2: {v2}");
    Ok(())
}
