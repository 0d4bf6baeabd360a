//! Where faults of an IOMMU are learned of. Type1 tells nobody; the kernel's log does, a few of them: it is rate-limited, and an
//! ordinary user may not read it. So a fault proves that a device was cut off, and no fault proves nothing.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use shootdown::Addr;

/// An access of a device that the IOMMU refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaFault {
    /// Where; its page at least is right.
    pub iova: Addr,
    /// Whether the device wrote.
    pub write: bool,
}

/// Somebody who learns of an IOMMU's faults.
pub trait FaultSource: Send + Sync {
    /// The faults since the last call, as far as they are known. Does not wait.
    fn take(&self) -> Vec<DmaFault>;
}

/// The kernel's log, `/dev/kmsg`, for one device.
#[derive(Debug)]
pub struct KernelLog {
    log: Mutex<File>,
    /// As the messages name it, `03:00.0`.
    device: String,
}

impl KernelLog {
    /// From now on, for the device at PCI `address`.
    ///
    /// # Errors
    /// This user may not read it, or there is none.
    pub fn open(address: &str) -> io::Result<Self> {
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        let device = address.split_once(':').map_or(address, |(_, rest)| rest);
        Ok(Self {
            log: Mutex::new(log),
            device: device.to_owned(),
        })
    }
}

impl FaultSource for KernelLog {
    fn take(&self) -> Vec<DmaFault> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let mut faults = Vec::new();
        // One record a read. Source: the kernel's Documentation/ABI/testing/dev-kmsg.
        let mut record = [0; 8192];
        loop {
            match log.read(&mut record) {
                Ok(0) => return faults,
                Ok(len) => faults.extend(parse(
                    &String::from_utf8_lossy(&record[..len]),
                    &self.device,
                )),
                // Older records were overwritten meanwhile: the next read goes on behind them.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EAGAIN, as a rule: the log has no more. Whatever else it says, a log that tells less proves nothing.
                Err(_) => return faults,
            }
        }
    }
}

/// A number in hexadecimal behind `key`, with or without its prefix.
fn number(line: &str, key: &str) -> Option<u64> {
    let rest = line.split_once(key)?.1.trim_start();
    let rest = rest.strip_prefix("0x").unwrap_or(rest);
    let end = rest.find(|c: char| !c.is_ascii_hexdigit());
    u64::from_str_radix(&rest[..end.unwrap_or(rest.len())], 16).ok()
}

/// The fault that a line of the log tells of: Intel's, and AMD's in both of its forms.
pub(crate) fn parse(line: &str, device: &str) -> Option<DmaFault> {
    if !line.contains(device) {
        return None;
    }
    if line.contains("DMAR:") {
        return Some(DmaFault {
            write: line.contains("[DMA Write"),
            iova: number(line, "fault addr")?.into(),
        });
    }
    if line.contains("AMD-Vi:") && line.contains("IO_PAGE_FAULT") {
        // Bit 5 of the flags is the direction. Source: AMD IOMMU specification 3.08, 2.5.3.
        const WRITE: u64 = 1 << 5;
        return Some(DmaFault {
            write: number(line, "flags=")? & WRITE != 0,
            iova: number(line, "address=")?.into(),
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_several_kernels_are_understood() {
        let write = Some(DmaFault {
            iova: 0x1000.into(),
            write: true,
        });
        for line in [
            "4,512,3141592,-;DMAR: [DMA Write NO_PASID] Request device [03:00.0] fault addr 0x1000 [fault reason 0x05] PTE Write access is not set",
            "DMAR: [DMA Write] Request device [03:00.0] PASID ffffffff fault addr 1000 [fault reason 05] PTE Write access is not set",
            "AMD-Vi: Event logged [IO_PAGE_FAULT device=03:00.0 domain=0x000a address=0x1000 flags=0x0020]",
            "3,9,1,-;nvme 0000:03:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000a address=0x1000 flags=0x0020]",
        ] {
            assert_eq!(parse(line, "03:00.0"), write, "{line}");
            assert_eq!(parse(line, "04:00.0"), None);
        }
        let read = "DMAR: [DMA Read NO_PASID] Request device [03:00.0] fault addr 0xffff000 [fault reason 0x06]";
        let fault = parse(read, "03:00.0").unwrap();
        assert_eq!((fault.iova, fault.write), (0xffff000.into(), false));
        assert_eq!(parse("pci 0000:03:00.0: enabling device", "03:00.0"), None);
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in "(DMAR:|AMD-Vi: IO_PAGE_FAULT|)( fault addr| address=| flags=)?.{0,40}") {
            let _ = parse(&format!("{line} 03:00.0 {line}"), "03:00.0");
        }
    }
}
