//! What sysfs says of PCI devices.

use std::path::{Path, PathBuf};

use crate::error::VfioError;

/// Where the kernel lists them.
const DEVICES: &str = "/sys/bus/pci/devices";

/// The directory of the device at `address`.
fn directory(address: &str) -> Result<PathBuf, VfioError> {
    let path = Path::new(DEVICES).join(address);
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

/// The number of the IOMMU group of the device at `address`.
///
/// # Errors
/// No such device; no group.
pub fn group(address: &str) -> Result<u32, VfioError> {
    let link = std::fs::read_link(directory(address)?.join("iommu_group"));
    let number = link
        .ok()
        .and_then(|link| link.file_name()?.to_str()?.parse().ok());
    number.ok_or_else(|| VfioError::NoGroup {
        address: address.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_an_error_that_names_it() {
        for address in ["ffff:ff:1f.7", "", "..", "../devices", "/", "."] {
            let error = group(address).unwrap_err();
            let expected = VfioError::NoDevice {
                address: address.to_owned(),
            };
            assert_eq!(error, expected);
        }
    }
}
