//! Whether somebody would miss a function if its driver let go of it. The kernel does not ask: it unbinds a disk with a mounted file
//! system as readily as any other.

use std::fmt;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Pci, read};
use crate::error::VfioError;

/// What a function is used for.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Use {
    /// A block device of it is mounted.
    Mounted {
        /// The block device.
        block: String,
        /// Where.
        at: String,
    },
    /// A block device of it is swapped to.
    Swap {
        /// The block device.
        block: String,
    },
    /// Another block device lies on a block device of it: RAID, LVM, encryption.
    Held {
        /// The block device.
        block: String,
        /// What lies on it.
        by: String,
    },
    /// A block device of it is somebody's alone, whoever that is.
    Claimed {
        /// The block device.
        block: String,
    },
    /// A network interface of it is up.
    Network {
        /// The interface.
        interface: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { block, at } => {
                write!(f, "{block} is mounted at {at}: umount {at}")
            }
            Self::Swap { block } => write!(f, "{block} is swapped to: swapoff /dev/{block}"),
            Self::Held { block, by } => {
                write!(f, "{block} is held by {by}: take that apart first")
            }
            Self::Claimed { block } => {
                write!(
                    f,
                    "/dev/{block} is open exclusively: see lsblk /dev/{block}"
                )
            }
            Self::Network { interface } => write!(
                f,
                "{interface} is up: ip link set {interface} down, if it is not the way to this machine"
            ),
        }
    }
}

/// How deep under a function its block devices and their partitions can be.
const DEPTH: usize = 6;

/// Directories below `path`, links not followed.
fn below(path: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    for entry in entries {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 0 {
                below(&entry.path(), depth - 1, found);
            }
            found.push(entry.path());
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Where the block device `number` is mounted. Fields: identifier, parent, major:minor, root, mount point. Source:
/// proc_pid_mountinfo(5).
pub(crate) fn mounted<'m>(mounts: &'m str, number: &'m str) -> impl Iterator<Item = String> + 'm {
    mounts.lines().filter_map(move |line| {
        let mut fields = line.split(' ').skip(2);
        (fields.next() == Some(number)).then(|| fields.nth(1).map_or("?".to_owned(), written))
    })
}

/// Whether the device at `path` is swapped to. Source: proc_swaps(5).
pub(crate) fn is_swapped_to(swaps: &str, path: &str) -> bool {
    let mut devices = swaps
        .lines()
        .filter_map(|line| line.split([' ', '\t']).next());
    devices.any(|device| written(device) == path)
}

/// A path as the kernel means it: what would end the field is written in octal, `\040` for a space.
fn written(field: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), field.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let octal = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &behind[3..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Pci {
    /// Who uses the function at `address` through its driver, as far as can be told: mounts, swap, stacked block devices, networks.
    ///
    /// # Errors
    /// There is no such function.
    pub fn uses(&self, address: &str) -> Result<Vec<Use>, VfioError> {
        // A link of sysfs leads to the real directory.
        let path = self.directory(address)?;
        let mut directories = Vec::new();
        below(&path, DEPTH, &mut directories);
        let mounts = read(&self.proc.join("self/mountinfo")).unwrap_or_default();
        let swaps = read(&self.proc.join("swaps")).unwrap_or_default();
        let mut uses = Vec::new();
        for one in &directories {
            let block = name(one);
            let parent = one.parent().map(name);
            if parent.as_deref() == Some("net")
                && read(&one.join("operstate")).as_deref() == Some("up")
            {
                uses.push(Use::Network { interface: block });
                continue;
            }
            let holders = fs::read_dir(one.join("holders"));
            let (Some(number), Ok(holders)) = (read(&one.join("dev")), holders) else {
                continue;
            };
            let known = uses.len();
            uses.extend(holders.flatten().map(|by| Use::Held {
                block: block.clone(),
                by: name(&by.path()),
            }));
            uses.extend(mounted(&mounts, &number).map(|at| Use::Mounted {
                block: block.clone(),
                at,
            }));
            if is_swapped_to(&swaps, &format!("/dev/{block}")) {
                uses.push(Use::Swap {
                    block: block.clone(),
                });
            }
            // What has no name above: a file system over several devices, a cluster's, another program's.
            let mut exclusive = fs::OpenOptions::new();
            let exclusive = exclusive.read(true).custom_flags(libc::O_EXCL);
            let refused = exclusive.open(self.dev.join(&block)).err();
            if uses.len() == known
                && refused.and_then(|error| error.raw_os_error()) == Some(libc::EBUSY)
            {
                uses.push(Use::Claimed { block });
            }
        }
        Ok(uses)
    }
}
