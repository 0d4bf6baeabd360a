//! What holds for whatever bytes the kernel, sysfs or its log gives: a function for each fuzz target of `tests/fuzz`. Each
//! compares with a second reading, by other means.

use std::collections::BTreeSet;

use shootdown::{Addr, Range};

use crate::answer::{parse_region, parse_siblings};
use crate::caps::{ChainError, walk};
use crate::container::IommuInfo;
use crate::faults;
use crate::iova::{Iovas, Reuse};
use crate::pci;

/// The number of `N` bytes at `at`.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let own = bytes.get(at..)?.get(..N)?;
    let mut wide = [0; 8];
    let from = if cfg!(target_endian = "little") {
        0
    } else {
        8 - N
    };
    wide[from..from + N].copy_from_slice(own);
    Some(u64::from_ne_bytes(wide))
}

/// Where the capabilities are; `None` if one passes the end or the chain comes back to itself.
fn chain(answer: &[u8], first: u64) -> Option<Vec<usize>> {
    let (mut found, mut seen, mut at) = (Vec::new(), BTreeSet::new(), first);
    while at != 0 {
        let place = at as usize;
        at = number::<4>(answer, place + 4)?;
        if !seen.insert(place) {
            return None;
        }
        found.push(place);
    }
    // Capabilities that overlap can be more than there is room for. No kernel makes them.
    (found.len() <= answer.len() / 8).then_some(found)
}

fn has_pair(answer: &[u8], pair: (u64, u64)) -> bool {
    (0..answer.len()).any(|at| {
        number::<8>(answer, at) == Some(pair.0) && number::<8>(answer, at + 8) == Some(pair.1)
    })
}

/// The answer of `VFIO_IOMMU_GET_INFO`, and the IOVAs that windows get by it.
pub fn iommu_info(answer: &[u8]) {
    let flags = number::<4>(answer, 4);
    let first = match flags {
        Some(flags) if flags & 2 == 0 => Some(0),
        _ => number::<4>(answer, 16),
    };
    let whole = flags.is_none_or(|flags| flags & 1 == 0 || number::<8>(answer, 8).is_some());
    let caps = first
        .filter(|_| whole)
        .and_then(|first| chain(answer, first));
    if let Some(first) = first {
        let walked = walk(answer, first as u32).map(|found| found.len()).ok();
        assert_eq!(walked, chain(answer, first).map(|caps| caps.len()));
    }
    let info = match IommuInfo::parse(answer) {
        Ok(info) => info,
        Err(ChainError::List { count, .. }) => {
            let caps = caps.expect("a list lies in a chain");
            let too_long = |at: &usize| {
                let room = answer.len().saturating_sub(at + 16) / 16;
                number::<4>(answer, at + 8) == Some(count.into()) && count as usize > room
            };
            assert!(caps.iter().any(too_long));
            return;
        }
        Err(ChainError::Outside { .. } | ChainError::Loop { .. } | ChainError::Region { .. }) => {
            let short = |at: usize| match number::<2>(answer, at) {
                Some(1) => number::<4>(answer, at + 8).is_none(),
                Some(2) => number::<8>(answer, at + 16).is_none(),
                Some(3) => number::<4>(answer, at + 8).is_none(),
                _ => false,
            };
            assert!(
                flags.is_none() || caps.is_none_or(|caps| caps.into_iter().any(short)),
                "nothing is wrong with it"
            );
            return;
        }
    };
    let caps = caps.expect("what is wrong is an error");
    assert!(info.page().is_power_of_two() && info.page_sizes & info.page() != 0);
    let told = |id| caps.iter().any(|at| number::<2>(answer, *at) == Some(id));
    assert_eq!(
        (info.dirty_page_sizes.is_some(), info.dma_avail.is_some()),
        (told(2), told(3))
    );
    let ranges = &info.iova_ranges;
    assert!(!ranges.is_empty());
    let default = Range::inclusive(0_u64, 0xfedf_ffff_u64).ok();
    for range in ranges {
        let pair = (range.start().get(), range.last().get());
        assert!(has_pair(answer, pair) || (ranges.len() == 1 && Some(*range) == default));
    }
    windows(ranges, info.page());
}

/// Whether every address of `wanted` is in one of the ranges, which may overlap.
fn covers(ranges: &[Range], wanted: Range) -> bool {
    let mut at = wanted.start();
    while wanted.holds(at) {
        let holding = ranges.iter().filter(|range| range.holds(at));
        let Some(last) = holding.map(|range| range.last()).max() else {
            return false;
        };
        let Some(next) = last.checked_add(1) else {
            return true;
        };
        at = next;
    }
    true
}

/// Windows of those IOVAs: inside of them, apart, at multiples of the page, and none where messages of interrupts are written.
fn windows(ranges: &[Range], page: u64) {
    let mut iovas = Iovas::new(ranges.iter().copied(), Reuse::Late);
    let mut taken: Vec<Range> = Vec::new();
    for nth in 1..6 {
        let Some(len) = page.checked_mul(nth) else {
            break;
        };
        let Some(found) = iovas.allocate(len, page, Addr::new(u64::MAX)) else {
            break;
        };
        assert!(covers(ranges, found), "{found} is not translated");
        assert!(found.start().get().is_multiple_of(page) && found.len() == len.into());
        assert!(
            taken.iter().all(|one| !one.overlaps(found)),
            "twice: {found}"
        );
        let forbidden = Range::inclusive(0xfee0_0000_u64, 0xfeef_ffff_u64).expect("not empty");
        assert!(!forbidden.overlaps(found) && found.start().get() >= 4096);
        taken.push(found);
    }
}

/// The answer of `VFIO_DEVICE_GET_REGION_INFO`.
pub fn region(answer: &[u8]) {
    let Ok((info, areas)) = parse_region(answer, 7) else {
        return;
    };
    assert_eq!(Some(info.size), number::<8>(answer, 16));
    assert_eq!(Some(info.offset), number::<8>(answer, 24));
    let end = info.offset.checked_add(info.size).expect("a region ends");
    assert!(i64::try_from(end).is_ok(), "files end there");
    assert!(
        areas.is_empty() || info.flags & 4 != 0,
        "it cannot be mapped"
    );
    for (offset, size) in &areas {
        assert!(
            *size > 0
                && offset
                    .checked_add(*size)
                    .is_some_and(|end| end <= info.size)
        );
        let whole = (*offset, *size) == (0, info.size);
        assert!(whole || has_pair(answer, (*offset, *size)));
    }
}

/// The answer of `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`.
pub fn hot_reset(answer: &[u8]) {
    let count = number::<4>(answer, 8);
    let room = answer.len().saturating_sub(12) / 8;
    match parse_siblings(answer) {
        Ok(siblings) => {
            assert_eq!(Some(siblings.len() as u64), count);
            assert!(siblings.len() <= room);
            for (nth, sibling) in siblings.iter().enumerate() {
                let at = 12 + 8 * nth;
                assert_eq!(Some(u64::from(sibling.group)), number::<4>(answer, at));
                let (segment, place) = (number::<2>(answer, at + 4), &answer[at + 6..at + 8]);
                let fields: Vec<u64> = sibling
                    .address
                    .split([':', '.'])
                    .map(|field| u64::from_str_radix(field, 16).expect("hexadecimal"))
                    .collect();
                let (bus, devfn) = (u64::from(place[0]), u64::from(place[1]));
                assert_eq!(fields, [segment.unwrap_or(0), bus, devfn / 8, devfn % 8]);
            }
        }
        Err(_) => assert!(count.is_none_or(|count| count > room as u64)),
    }
}

/// A function's configuration space, as sysfs gives it.
pub fn configuration_space(bytes: &[u8]) {
    let Some(found) = pci::translation(bytes) else {
        return assert!(bytes.len() < 256);
    };
    let anywhere = |id: u16| {
        let words = bytes.get(256..).unwrap_or_default().chunks_exact(4);
        words.into_iter().any(|word| word[..2] == id.to_le_bytes())
    };
    let said = [(found.ats, 0xf), (found.pri, 0x13), (found.pasid, 0x1b)];
    assert!(said.into_iter().all(|(is, id)| !is || anywhere(id)));
    let mut at = 256;
    let header = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let mut seen = BTreeSet::new();
    let mut walked = [false; 3];
    while at >= 256 && seen.insert(at) {
        let Some(header) = header(at) else { break };
        match header & 0xffff {
            0 | 0xffff => break,
            id => {
                walked = [
                    walked[0] | (id == 0xf),
                    walked[1] | (id == 0x13),
                    walked[2] | (id == 0x1b),
                ]
            }
        }
        at = (header >> 20) as usize / 4 * 4;
    }
    assert_eq!(walked, said.map(|(is, _)| is));
}

/// A record of the kernel's log.
pub fn kernel_log(bytes: &[u8]) {
    let line = String::from_utf8_lossy(bytes);
    if let Some(fault) = faults::parse(&line, "03:00.0") {
        assert!(line.contains("03:00.0") && (line.contains("DMAR:") || line.contains("AMD-Vi:")));
        let digits = format!("{:x}", fault.iova.get());
        assert!(line.to_ascii_lowercase().contains(&digits), "{fault:?}");
        assert!(!fault.write || line.contains("Write") || line.contains("flags="));
    }
    let others = line.replace("03:00.0", "");
    if !others.contains("03:00.0") {
        assert_eq!(faults::parse(&others, "03:00.0"), None);
    }
}

/// Identifiers, mounts and swap, as sysfs and proc write them.
pub fn sysfs(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines() {
        if let Some(value) = pci::hexadecimal(line.trim()) {
            let digits = line.trim().trim_start_matches("0x").trim_start_matches('0');
            assert_eq!(
                format!("{value:x}").trim_start_matches('0'),
                digits.to_lowercase()
            );
        }
    }
    let of_the_device = text
        .lines()
        .filter(|line| line.split(' ').nth(2) == Some("259:1"));
    let mounted: Vec<String> = pci::in_use::mounted(&text, "259:1").collect();
    assert_eq!(mounted.len(), of_the_device.count());
    // A path is never longer than its field, and whoever is told to umount it can name it.
    let fields = text
        .lines()
        .filter(|line| line.split(' ').nth(2) == Some("259:1"));
    for (at, line) in mounted.iter().zip(fields) {
        let field = line.split(' ').nth(4).unwrap_or("?");
        assert!(at.chars().count() <= field.chars().count());
        if !field.contains('\\') {
            assert_eq!(at, field);
        }
        assert!(!at.contains("\\040") || field.contains("\\134"));
    }
    let named = text.lines().any(|line| line.starts_with("/dev/nvme0n1 "));
    assert!(!named || pci::in_use::is_swapped_to(&text, "/dev/nvme0n1"));
}

#[cfg(test)]
#[path = "../../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn the_corpus_of_answers_holds() {
        replay("vfio_iommu_info", 256, super::iommu_info);
        replay("vfio_region", 256, super::region);
        replay("vfio_hot_reset", 256, super::hot_reset);
    }

    #[test]
    fn the_corpus_of_sysfs_and_log_holds() {
        replay("pci_configuration_space", 256, super::configuration_space);
        replay("kernel_log", 256, super::kernel_log);
        replay("sysfs", 256, super::sysfs);
    }
}
