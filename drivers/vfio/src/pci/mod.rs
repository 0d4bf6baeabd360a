//! What sysfs says of PCI functions: who they are, who has them, what their group is, and whether VFIO can have them.

mod bind;
pub(crate) mod in_use;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

pub use bind::{BindError, Bound};
pub use in_use::Use;

use crate::error::VfioError;

/// Where the kernel lists what it knows of PCI, `/sys/bus/pci`. Another directory has the same layout, for a test.
#[derive(Clone, Debug)]
pub struct Pci {
    root: PathBuf,
    /// For what is mounted and swapped to: `/proc`.
    proc: PathBuf,
    /// Where block devices are opened, `/dev`.
    dev: PathBuf,
}

/// Capabilities for translations that a function caches, in its extended configuration space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Address Translation Services: it has a TLB of its own.
    pub ats: bool,
    /// Page Request Interface: it can ask for pages that are not there.
    pub pri: bool,
    /// Process Address Space Identifiers: it can use several address spaces.
    pub pasid: bool,
}

/// A PCI function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// Its address, `0000:03:00.0`.
    pub address: String,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// How the kernel would reset it, the first way first: `flr`, `pm`, `bus`.
    pub resets: Vec<String>,
    /// `None` where this user may not read extended configuration space.
    pub translation: Option<Translation>,
}

/// A group of functions that the IOMMU cannot tell apart: VFIO has all of them, or none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupInfo {
    /// Its number.
    pub number: u32,
    /// Who is in it.
    pub members: Vec<Member>,
}

/// A function in a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Its address.
    pub address: String,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// It makes no DMA of its own.
    pub is_bridge: bool,
}

impl Member {
    /// Whether it keeps VFIO from having the group.
    pub fn blocks(&self) -> bool {
        let harmless = [None, Some("vfio-pci"), Some("pci-stub")];
        !self.is_bridge && !harmless.contains(&self.driver.as_deref())
    }
}

impl GroupInfo {
    /// Whether VFIO can have it: every function is bound to vfio-pci, or to nothing.
    pub fn is_viable(&self) -> bool {
        !self.members.iter().any(Member::blocks)
    }
}

/// Where to begin: bridges have class 0x0604.
const BRIDGE: u32 = 0x0604;

impl Default for Pci {
    fn default() -> Self {
        Self {
            root: "/sys/bus/pci".into(),
            proc: "/proc".into(),
            dev: "/dev".into(),
        }
    }
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// A number as sysfs writes identifiers: `0x1234`.
pub(crate) fn hexadecimal(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0x")?;
    // A sign is none of its.
    let all = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u32::from_str_radix(digits, 16).ok().filter(|_| all)
}

fn number(path: &Path) -> Option<u32> {
    hexadecimal(&read(path)?)
}

/// The last part of where a link leads.
fn link(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

impl Pci {
    /// The directory of the function at `address`.
    fn directory(&self, address: &str) -> Result<PathBuf, VfioError> {
        let path = self.root.join("devices").join(address);
        // A path would lead elsewhere.
        let of_an_address = |c: char| c.is_ascii_hexdigit() || c == ':' || c == '.';
        if address.contains(':') && address.chars().all(of_an_address) && path.is_dir() {
            Ok(path)
        } else {
            Err(VfioError::NoDevice {
                address: address.to_owned(),
            })
        }
    }

    /// All functions, by address.
    ///
    /// # Errors
    /// There is no sysfs.
    pub fn functions(&self) -> Result<Vec<Function>, VfioError> {
        let devices = self.root.join("devices");
        let entries =
            fs::read_dir(&devices).map_err(|error| crate::error::open(devices.clone(), &error))?;
        let mut found: Vec<Function> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                // One that was unplugged meanwhile is none.
                self.function(name.to_str()?).ok()
            })
            .collect();
        found.sort_by(|one, other| one.address.cmp(&other.address));
        Ok(found)
    }

    /// The function at `address`.
    ///
    /// # Errors
    /// There is none.
    pub fn function(&self, address: &str) -> Result<Function, VfioError> {
        let path = self.directory(address)?;
        let identifier = |file: &str| {
            let found = number(&path.join(file)).and_then(|number| u16::try_from(number).ok());
            found.unwrap_or(0)
        };
        let resets = read(&path.join("reset_method")).unwrap_or_default();
        Ok(Function {
            address: address.to_owned(),
            vendor: identifier("vendor"),
            device: identifier("device"),
            class: number(&path.join("class")).unwrap_or(0),
            driver: link(&path.join("driver")),
            group: link(&path.join("iommu_group")).and_then(|name| name.parse().ok()),
            resets: resets.split_whitespace().map(str::to_owned).collect(),
            translation: fs::read(path.join("config"))
                .ok()
                .and_then(|config| translation(&config)),
        })
    }

    /// The group of a function.
    ///
    /// # Errors
    /// No such function; no group.
    pub fn group_of(&self, address: &str) -> Result<GroupInfo, VfioError> {
        let path = self.directory(address)?;
        let function = self.function(address)?;
        let number = function.group.ok_or_else(|| VfioError::NoGroup {
            address: address.to_owned(),
        })?;
        let entries = fs::read_dir(path.join("iommu_group/devices"));
        let mut members: Vec<Member> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                let one = self.function(name.to_str()?).ok()?;
                Some(Member {
                    address: one.address,
                    driver: one.driver,
                    is_bridge: one.class >> 8 == BRIDGE,
                })
            })
            .collect();
        members.sort_by(|one, other| one.address.cmp(&other.address));
        Ok(GroupInfo { number, members })
    }
}

/// The number of the IOMMU group of the function at `address`.
///
/// # Errors
/// No such device; no group.
pub fn group(address: &str) -> Result<u32, VfioError> {
    let function = Pci::default().function(address)?;
    function.group.ok_or_else(|| VfioError::NoGroup {
        address: address.to_owned(),
    })
}

/// Extended capabilities. Source: PCI Express Base 5.0, 7.7 and 10.5.
const ATS: u32 = 0x000f;
const PRI: u32 = 0x0013;
const PASID: u32 = 0x001b;

/// Walks the extended capabilities in the bytes of a configuration space; `None` where they are not all there.
pub(crate) fn translation(config: &[u8]) -> Option<Translation> {
    const EXTENDED: usize = 0x100;
    if config.len() < EXTENDED {
        return None;
    }
    let mut found = Translation {
        ats: false,
        pri: false,
        pasid: false,
    };
    let word = |at: usize| {
        let bytes = config.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let mut at = EXTENDED;
    // As many as there is room for: a chain that comes back to itself ends.
    for _ in 0..config.len() / 4 {
        // Conventional PCI has none: 256 bytes.
        let Some(header) = word(at) else { break };
        match header & 0xffff {
            // Nobody answers, or there are none.
            0xffff | 0 => break,
            ATS => found.ats = true,
            PRI => found.pri = true,
            PASID => found.pasid = true,
            _ => {}
        }
        at = (header >> 20) as usize & !3;
        if at < EXTENDED {
            break;
        }
    }
    Some(found)
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({:04x}:{:04x})",
            self.address, self.vendor, self.device
        )
    }
}
