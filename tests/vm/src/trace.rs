//! QEMU's trace events of the emulated Intel IOMMU, and how they are told apart from the guest's own output.
//!
//! The layout of the descriptors is that of the Intel VT-d specification, 6.5.2 (queued invalidation). The texts of the
//! events are QEMU's, as versions 7.2 and 10.0 print them.

use crate::protocol::{Iova, Line, Requester, number};

/// Bytes of an IOMMU page of the smallest size.
const PAGE: u64 = 4096;

/// What the IOMMU did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Translations of every domain were invalidated.
    IotlbGlobal,
    /// All translations of a domain were invalidated.
    IotlbDomain(u16),
    /// The translations of a range of a domain were invalidated.
    IotlbPages(u16, Iova),
    /// The translations of a range in a device's ATS cache were invalidated.
    DeviceTlb(Requester, Iova),
    /// A wait descriptor wrote its status: everything before it is complete.
    Wait,
    /// A DMA was refused.
    Fault {
        /// Who tried it.
        requester: Requester,
        /// Where it went to.
        address: u64,
        /// Whether it wanted to write.
        write: bool,
    },
}

impl Event {
    /// Reads one trace line; `None` for events that prove nothing here.
    pub fn parse(text: &str) -> Option<Self> {
        let (event, rest) = text.split_once(' ')?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let after = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1).copied()
        };
        match event {
            "vtd_inv_desc" if after("type")? == "device" => {
                device(number(after("high")?)?, number(after("low")?)?)
            }
            "vtd_inv_desc_iotlb_global" => Some(Self::IotlbGlobal),
            "vtd_inv_desc_iotlb_domain" => Some(Self::IotlbDomain(
                number(after("domain")?)?.try_into().ok()?,
            )),
            "vtd_inv_desc_iotlb_pages" => {
                let domain = number(after("domain")?)?.try_into().ok()?;
                let bytes = PAGE.checked_shl(number(after("mask")?)?.try_into().ok()?)?;
                // The hardware ignores the address bits below the mask.
                let start = number(after("addr")?)? & !(bytes.checked_sub(1)?);
                Some(Self::IotlbPages(domain, Iova::new(start, bytes)?))
            }
            "vtd_inv_desc_wait_sw" => Some(Self::Wait),
            "vtd_dmar_fault" => Some(Self::Fault {
                requester: Requester(number(after("sid")?)?.try_into().ok()?),
                address: number(after("addr")?)?,
                write: after("write")? == "1",
            }),
            _ => None,
        }
    }
}

/// A device-TLB invalidation: the low half has the requester in bits 32-47, the high half the address from bit 12 on. With
/// bit 0 set the range is longer than a page, and the lowest clear bit of the address says how long.
fn device(high: u64, low: u64) -> Option<Event> {
    let requester = Requester((low >> 32) as u16);
    let pages = high / PAGE;
    if high & 1 == 0 {
        return Some(Event::DeviceTlb(requester, Iova::new(pages * PAGE, PAGE)?));
    }
    let log2 = pages.trailing_ones() + 1;
    if log2 >= 52 {
        return Some(Event::DeviceTlb(requester, Iova::new(0, u64::MAX)?));
    }
    let bytes = PAGE << log2;
    let start = (pages * PAGE) & !(bytes - 1);
    Some(Event::DeviceTlb(requester, Iova::new(start, bytes)?))
}

/// A piece of the pipe that guest, guest's kernel and QEMU write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The guest program said this.
    Guest(Line),
    /// The IOMMU did this.
    Iommu(Event),
    /// Anything else: the kernel's console, QEMU's messages.
    Other(String),
}

/// Cuts the pipe into items.
///
/// The guest's bytes come one by one, a line of QEMU comes in one write: QEMU's can stand in the middle of a line of the guest,
/// never the other way round. The guest ends its lines with CR LF, QEMU with LF alone.
#[derive(Debug, Default)]
pub struct Splitter {
    /// The beginning of a guest line that QEMU interrupted.
    guest: String,
}

/// How QEMU's lines begin: those of the trace, and its messages.
const QEMU: [&str; 3] = ["vtd_inv_desc", "vtd_dmar_fault", "qemu-system-"];

impl Splitter {
    /// What `line`, which ended with a line feed (not included), says.
    pub fn line(&mut self, line: &str) -> Option<Item> {
        if let Some(at) = QEMU.iter().filter_map(|begin| line.find(begin)).min() {
            self.guest.push_str(&line[..at]);
            let text = &line[at..];
            if text.starts_with("vtd_") {
                return Event::parse(text).map(Item::Iommu);
            }
            return Some(Item::Other(text.to_owned()));
        }
        let Some(end) = line.strip_suffix('\r') else {
            return Some(Item::Other(line.to_owned()));
        };
        self.guest.push_str(end);
        let whole = std::mem::take(&mut self.guest);
        Some(match Line::parse(&whole) {
            Some(said) => Item::Guest(said),
            None => Item::Other(whole),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> Iova {
        Iova::new(start, len).unwrap()
    }

    #[test]
    fn recorded_lines_are_read() {
        for (text, event) in [
            (
                "vtd_inv_desc_iotlb_global iotlb invalidate global",
                Event::IotlbGlobal,
            ),
            (
                "vtd_inv_desc_iotlb_domain iotlb invalidate whole domain 0x2",
                Event::IotlbDomain(2),
            ),
            (
                "vtd_inv_desc_iotlb_pages iotlb invalidate domain 0x1 addr 0x10000000 mask 0x3",
                Event::IotlbPages(1, range(0x1000_0000, 0x8000)),
            ),
            (
                "vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b5c84 data 0x2",
                Event::Wait,
            ),
            (
                "vtd_dmar_fault sid 0x20 fault 5 addr 0x10000ffc write 1",
                Event::Fault {
                    requester: Requester(0x20),
                    address: 0x1000_0ffc,
                    write: true,
                },
            ),
        ] {
            assert_eq!(Event::parse(text), Some(event), "{text}");
        }
    }

    #[test]
    fn events_that_prove_nothing_are_left_out() {
        for text in [
            "vtd_inv_desc invalidate desc type wait high 0x11b5c84 low 0x200000025",
            "vtd_inv_desc_iec granularity 0x1 index 0x3 mask 0x0",
            "vtd_inv_desc_iotlb_pages iotlb invalidate domain 0x1 addr",
        ] {
            assert_eq!(Event::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_device_tlb_descriptor_names_its_requester_and_length() {
        let event = |high: u64, low: u64| {
            Event::parse(&format!(
                "vtd_inv_desc invalidate desc type device high {high:#x} low {low:#x}"
            ))
        };
        let low = 0x0100_0000_0003;
        let device = |start, len| Some(Event::DeviceTlb(Requester(0x100), range(start, len)));
        assert_eq!(event(0x1000_0000, low), device(0x1000_0000, 0x1000));
        assert_eq!(event(0x1000_0001, low), device(0x1000_0000, 0x2000));
        assert_eq!(event(0x1000_3001, low), device(0x1000_0000, 0x8000));
        assert_eq!(event(0x7fff_ffff_ffff_f001, low), device(0, u64::MAX));
    }

    #[test]
    fn a_guest_line_that_qemu_cuts_is_put_together() {
        let mut splitter = Splitter::default();
        let wait = "vtd_inv_desc_wait_sw wait invalidate status write addr 0x11b523c data 0x2";
        let message = "qemu-system-x86_64: vtd_iommu_translate: detected translation failure (dev=00:01:00, iova=0x30000000)";
        assert_eq!(
            splitter.line(&format!("UNMAP 0x10{wait}")),
            Some(Item::Iommu(Event::Wait))
        );
        assert_eq!(
            splitter.line(&format!("0{message}")),
            Some(Item::Other(message.into()))
        );
        assert_eq!(
            splitter.line("a library: warning"),
            Some(Item::Other("a library: warning".into()))
        );
        assert_eq!(
            splitter.line("0 0x1000\r"),
            Some(Item::Guest(Line::Unmap(range(0x1000, 0x1000))))
        );
    }
}
