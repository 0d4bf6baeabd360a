//! A bit for each granule of a window.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit a granule. Relaxed throughout: the registry's generations, and the lock, order what they stand for.
#[derive(Debug)]
pub(crate) struct Bits(Box<[AtomicU64]>);

impl Bits {
    pub(crate) fn new(granules: u64) -> Self {
        Self(
            (0..granules.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        )
    }

    pub(crate) fn get(&self, number: u64) -> bool {
        self.0[(number / 64) as usize].load(Ordering::Relaxed) & 1 << (number % 64) != 0
    }

    /// By words: a window may have very many granules.
    pub(crate) fn set(&self, numbers: RangeInclusive<u64>, to: bool) {
        let (mut number, last) = (*numbers.start(), *numbers.end());
        while number <= last {
            let upto = last.min(number | 63);
            let bits = (u64::MAX >> (63 - (upto - number))) << (number % 64);
            let word = &self.0[(number / 64) as usize];
            if to {
                word.fetch_or(bits, Ordering::Relaxed);
            } else {
                word.fetch_and(!bits, Ordering::Relaxed);
            }
            number = upto + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_agree_with_a_list_of_bools(
            steps in proptest::collection::vec((0_u64..200, 0_u64..200, any::<bool>()), 1..30)
        ) {
            let (bits, mut list) = (Bits::new(200), [false; 200]);
            for (one, other, to) in steps {
                let (first, last) = (one.min(other), one.max(other));
                bits.set(first..=last, to);
                list[first as usize..=last as usize].fill(to);
                for (number, expected) in (0..).zip(list) {
                    prop_assert_eq!(bits.get(number), expected);
                }
            }
        }
    }
}
