//! PCI devices as sysfs shows them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use shootdown_vm::protocol::Requester;

/// QEMU's edu: vendor and device.
pub(crate) const EDU: (u16, u16) = (0x1234, 0x11e8);
/// QEMU's NVMe controller. There are two: the disk of the second is slow.
pub(crate) const NVME: (u16, u16) = (0x1b36, 0x0010);
/// QEMU's virtio entropy device, which has an ATS cache here.
pub(crate) const RNG: (u16, u16) = (0x1af4, 0x1044);

/// A PCI function.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    /// Its address, `0000:00:03.0`.
    pub(crate) address: String,
    path: PathBuf,
}

impl Function {
    /// The first function with this vendor and device identifier.
    pub(crate) fn find(which: (u16, u16)) -> io::Result<Self> {
        Self::nth(which, 0)
    }

    /// The `nth` function with this vendor and device identifier, by address.
    pub(crate) fn nth((vendor, device): (u16, u16), nth: usize) -> io::Result<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/bus/pci/devices")? {
            let path = entry?.path();
            let is = |file: &str, value: u16| -> io::Result<bool> {
                Ok(fs::read_to_string(path.join(file))?.trim() == format!("{value:#06x}"))
            };
            if is("vendor", vendor)? && is("device", device)? {
                found.push(Self {
                    address: name(&path),
                    path,
                });
            }
        }
        found.sort_by(|one, other| one.address.cmp(&other.address));
        let missing = || {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("no PCI function {vendor:04x}:{device:04x} number {nth}"),
            )
        };
        found.into_iter().nth(nth).ok_or_else(missing)
    }

    /// Hands it to vfio-pci, whatever driver has it.
    pub(crate) fn bind_to_vfio(&self) -> io::Result<()> {
        if self.driver()?.as_deref() == Some("vfio-pci") {
            return Ok(());
        }
        fs::write(self.path.join("driver_override"), "vfio-pci")?;
        if self.driver()?.is_some() {
            self.unbind()?;
        }
        fs::write("/sys/bus/pci/drivers_probe", &self.address)
    }

    /// Gives it to the driver that the kernel has for it, if there is one.
    pub(crate) fn give_back(&self) -> io::Result<()> {
        self.unbind()?;
        fs::write(self.path.join("driver_override"), "\n")?;
        fs::write("/sys/bus/pci/drivers_probe", &self.address)
    }

    /// The driver that it is promised to, whatever its identity.
    pub(crate) fn promised_to(&self) -> io::Result<Option<String>> {
        let text = fs::read_to_string(self.path.join("driver_override"))?;
        Ok(Some(text.trim().to_owned()).filter(|name| name != "(null)"))
    }

    /// Takes it from its driver. The kernel waits for that driver's user to give it up.
    pub(crate) fn unbind(&self) -> io::Result<()> {
        fs::write(self.path.join("driver/unbind"), &self.address)
    }

    /// The driver that has it.
    pub(crate) fn driver(&self) -> io::Result<Option<String>> {
        match fs::read_link(self.path.join("driver")) {
            Ok(link) => Ok(Some(name(&link))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Its IOMMU group.
    pub(crate) fn group(&self) -> io::Result<String> {
        Ok(name(&fs::read_link(self.path.join("iommu_group"))?))
    }

    /// What the IOMMU calls it.
    pub(crate) fn requester(&self) -> Requester {
        let part = |range| u16::from_str_radix(&self.address[range], 16).unwrap_or(u16::MAX);
        Requester(part(5..7) << 8 | part(8..10) << 3 | part(11..12))
    }
}

fn name(link: &Path) -> String {
    link.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
