//! The kernel's answers about regions and resets, read inside their bounds.

use std::mem::{offset_of, size_of};

use vfio_bindings::bindings::vfio as abi;

use crate::caps::{Bytes, ChainError, walk};
use crate::device::Sibling;

/// The kernel's answer for a region, and what of it can be mapped.
pub(crate) fn parse_region(
    answer: &[u8],
    index: u32,
) -> Result<(abi::vfio_region_info, Vec<(u64, u64)>), ChainError> {
    let bytes = Bytes(answer);
    let info = abi::vfio_region_info {
        argsz: 0,
        flags: bytes.u32(offset_of!(abi::vfio_region_info, flags))?,
        index,
        cap_offset: bytes.u32(offset_of!(abi::vfio_region_info, cap_offset))?,
        size: bytes.u64(offset_of!(abi::vfio_region_info, size))?,
        offset: bytes.u64(offset_of!(abi::vfio_region_info, offset))?,
    };
    let inside = |offset: u64, size: u64, end: u64| match offset.checked_add(size) {
        Some(last) if last <= end => Ok(()),
        _ => Err(ChainError::Region { offset, size }),
    };
    // Offsets of files are signed.
    inside(info.offset, info.size, i64::MAX as u64)?;
    if info.flags & abi::VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Ok((info, Vec::new()));
    }
    let mut mappable = vec![(0, info.size)];
    if info.flags & abi::VFIO_REGION_INFO_FLAG_CAPS != 0 {
        let chain = walk(answer, info.cap_offset)?;
        let mut sparse = chain
            .iter()
            .filter(|one| u32::from(one.id) == abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP);
        if let Some(one) = sparse.next() {
            mappable = one.pairs(
                offset_of!(abi::vfio_region_info_cap_sparse_mmap, nr_areas),
                offset_of!(abi::vfio_region_info_cap_sparse_mmap, areas),
            )?;
        }
    }
    mappable.retain(|(_, size)| *size > 0);
    for (offset, size) in &mappable {
        inside(*offset, *size, info.size)?;
    }
    Ok((info, mappable))
}

/// The kernel's answer for a hot reset.
pub(crate) fn parse_siblings(answer: &[u8]) -> Result<Vec<Sibling>, ChainError> {
    let bytes = Bytes(answer);
    let count = bytes.u32(offset_of!(abi::vfio_pci_hot_reset_info, count))?;
    // Ends at the end of the answer, whatever the count says.
    let siblings = (0..count as usize).map(|nth| {
        let at = size_of::<abi::vfio_pci_hot_reset_info>()
            + nth * size_of::<abi::vfio_pci_dependent_device>();
        let place = bytes.u32(at + 4)?.to_ne_bytes();
        let segment = u16::from_ne_bytes([place[0], place[1]]);
        let (bus, devfn) = (place[2], place[3]);
        Ok(Sibling {
            group: bytes.u32(at)?,
            address: format!("{segment:04x}:{bus:02x}:{:02x}.{}", devfn >> 3, devfn & 7),
        })
    });
    siblings.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// A BAR of 16 KiB whose second page is an MSI-X table, as older kernels give it.
    fn sparse() -> Vec<u8> {
        let flags = 0xf;
        let fixed = [64 + 16, flags, 2, 32, 0x4000, 0, 0, 0x200];
        let header = [1 << 16 | 1, 0, 2, 0];
        let areas = [0, 0, 0x1000, 0, 0x2000, 0, 0x2000, 0];
        words(&[&fixed[..], &header, &areas].concat())
    }

    #[test]
    fn of_a_sparse_region_only_its_areas_are_mapped() {
        let (info, areas) = parse_region(&sparse(), 2).unwrap();
        assert_eq!((info.size, info.offset), (0x4000, 0x200_0000_0000));
        assert_eq!(areas, [(0, 0x1000), (0x2000, 0x2000)]);
    }

    #[test]
    fn siblings_are_named_as_the_kernel_names_them() {
        let place = u32::from_ne_bytes([1, 0, 0x3a, 0x1f << 3 | 7]);
        let answer = words(&[20, 0, 1, 12, place]);
        let expected = Sibling {
            address: "0001:3a:1f.7".into(),
            group: 12,
        };
        assert_eq!(parse_siblings(&answer), Ok(vec![expected]));
        let hostile = words(&[20, 0, u32::MAX, 12, place]);
        assert!(parse_siblings(&hostile).is_err());
    }

    proptest! {
        #[test]
        fn hostile_answers_neither_panic_nor_hang(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            (at, value, len) in (0_usize..80, any::<u8>(), 0_usize..81),
        ) {
            let mut damaged = sparse();
            damaged[at] = value;
            damaged.truncate(len);
            for answer in [bytes, damaged] {
                let _ = (parse_region(&answer, 0), parse_siblings(&answer));
            }
        }
    }
}
