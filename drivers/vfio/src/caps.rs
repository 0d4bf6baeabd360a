//! Capability chains: what the kernel appends to the answers of its info calls.
//!
//! An answer is a block of bytes; a chain begins at the offset that the fixed part names, and each capability names the next, 0
//! for none. One walker for all of them: it reads inside the block only, and ends on every input, a loop included.

use std::mem::{offset_of, size_of};

use thiserror::Error;
use vfio_bindings::bindings::vfio as abi;

/// A chain that the kernel would not make.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ChainError {
    /// It points outside of the answer.
    #[error("a capability at offset {offset} passes the end of an answer of {len} bytes")]
    Outside {
        /// Where.
        offset: usize,
        /// How long the answer is.
        len: usize,
    },
    /// It comes back to itself.
    #[error("the capability chain does not end: more than {most} entries in {len} bytes")]
    Loop {
        /// How many could be there.
        most: usize,
        /// How long the answer is.
        len: usize,
    },
    /// A list in a capability is longer than the answer.
    #[error("capability {id} has {count} entries, which pass the end of the answer")]
    List {
        /// The capability.
        id: u16,
        /// How many it says it has.
        count: u32,
    },
    /// A region, or a part of one, ends nowhere.
    #[error("{size:#x} bytes at {offset:#x} pass the end of what a file or its region can be")]
    Region {
        /// In bytes.
        offset: u64,
        /// In bytes.
        size: u64,
    },
}

/// Numbers in an answer, by offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(self, offset: usize) -> Result<[u8; N], ChainError> {
        let outside = ChainError::Outside {
            offset,
            len: self.0.len(),
        };
        let end = offset.checked_add(N).ok_or(outside)?;
        let bytes = self.0.get(offset..end).ok_or(outside)?;
        bytes.try_into().map_err(|_| outside)
    }

    pub(crate) fn u16(self, offset: usize) -> Result<u16, ChainError> {
        self.array(offset).map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(self, offset: usize) -> Result<u32, ChainError> {
        self.array(offset).map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(self, offset: usize) -> Result<u64, ChainError> {
        self.array(offset).map(u64::from_ne_bytes)
    }
}

/// One capability of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capability<'a> {
    pub(crate) id: u16,
    /// From its header to the end of the answer: it does not say how long it is.
    bytes: Bytes<'a>,
}

impl<'a> Capability<'a> {
    pub(crate) fn u32(&self, offset: usize) -> Result<u32, ChainError> {
        self.bytes.u32(offset)
    }

    pub(crate) fn u64(&self, offset: usize) -> Result<u64, ChainError> {
        self.bytes.u64(offset)
    }

    /// A list of pairs of 64-bit numbers: their count is at `count`, they begin at `first`.
    pub(crate) fn pairs(&self, count: usize, first: usize) -> Result<Vec<(u64, u64)>, ChainError> {
        let count = self.u32(count)?;
        let error = ChainError::List { id: self.id, count };
        let room = self.bytes.0.len().saturating_sub(first) / 16;
        // Before anything is allocated for it.
        if count as usize > room {
            return Err(error);
        }
        (0..count as usize)
            .map(|nth| Ok((self.u64(first + 16 * nth)?, self.u64(first + 16 * nth + 8)?)))
            .collect()
    }
}

/// The capabilities of `answer`, from the one at `first` on; none if that is 0.
pub(crate) fn walk(answer: &[u8], first: u32) -> Result<Vec<Capability<'_>>, ChainError> {
    let header = size_of::<abi::vfio_info_cap_header>();
    let most = answer.len() / header;
    let mut found = Vec::new();
    let mut next = first as usize;
    while next != 0 {
        if found.len() == most {
            return Err(ChainError::Loop {
                most,
                len: answer.len(),
            });
        }
        let outside = ChainError::Outside {
            offset: next,
            len: answer.len(),
        };
        let bytes = Bytes(answer.get(next..).ok_or(outside)?);
        found.push(Capability {
            id: bytes.u16(offset_of!(abi::vfio_info_cap_header, id))?,
            bytes,
        });
        next = bytes.u32(offset_of!(abi::vfio_info_cap_header, next))? as usize;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(id: u16, next: u32) -> Vec<u8> {
        let mut bytes = id.to_ne_bytes().to_vec();
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_chain_is_followed_to_its_end() {
        let mut answer = vec![0; 16];
        answer.extend(header(3, 28));
        answer.extend([7, 0, 0, 0]);
        answer.extend(header(1, 0));
        let found = walk(&answer, 16).unwrap();
        let ids: Vec<u16> = found.iter().map(|one| one.id).collect();
        assert_eq!(ids, [3, 1]);
        assert_eq!(found[0].u32(8), Ok(7));
        assert!(walk(&answer, 0).unwrap().is_empty());
    }

    #[test]
    fn a_loop_ends_in_an_error() {
        let mut answer = vec![0; 8];
        answer.extend(header(1, 16));
        answer.extend(header(2, 8));
        assert!(matches!(walk(&answer, 8), Err(ChainError::Loop { .. })));
    }

    #[test]
    fn what_passes_the_end_is_an_error() {
        let answer = header(1, 100);
        assert!(matches!(walk(&answer, 4), Err(ChainError::Outside { .. })));
        assert!(matches!(walk(&answer, 9), Err(ChainError::Outside { .. })));
        // An offset of the wrapping kind.
        assert!(matches!(
            walk(&answer, u32::MAX),
            Err(ChainError::Outside { .. })
        ));
    }

    #[test]
    fn a_list_longer_than_the_answer_is_an_error_before_it_is_allocated() {
        let mut answer = vec![0; 4];
        answer.extend(header(1, 0));
        answer.extend(u32::MAX.to_ne_bytes());
        answer.extend([0; 36]);
        let found = walk(&answer, 4).unwrap();
        assert_eq!(
            found[0].pairs(8, 16),
            Err(ChainError::List {
                id: 1,
                count: u32::MAX
            })
        );
    }

    proptest! {
        #[test]
        fn hostile_bytes_neither_panic_nor_hang(
            answer in proptest::collection::vec(any::<u8>(), 0..200),
            first in any::<u32>(),
            small in 0_u32..200,
        ) {
            for first in [first, small] {
                if let Ok(found) = walk(&answer, first) {
                    prop_assert!(found.len() <= answer.len() / 8);
                    for one in found {
                        let _ = (one.pairs(8, 16), one.u32(190), one.u64(usize::MAX));
                    }
                }
            }
        }

        /// Offsets that stay inside the answer, so that loops are common.
        #[test]
        fn hostile_chains_end(nexts in proptest::collection::vec(0_u32..16, 1..16), first in 0_u32..16) {
            let answer: Vec<u8> = nexts.iter().flat_map(|next| header(1, next * 8)).collect();
            if let Ok(found) = walk(&answer, first * 8) {
                prop_assert!(found.len() <= nexts.len());
            }
        }
    }
}
