//! The corpus of a fuzz target, on any toolchain: each of its files, and each so many times with some bytes changed, always the
//! same ones. What a fuzzer has found once is found again here. Included by the tests of each crate that has targets.

use std::fs;
use std::panic::{catch_unwind, resume_unwind};
use std::path::Path;

/// Numbers that look random: SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % below.max(1) as u64) as usize
    }
}

/// A few bytes of `seed` changed, others left out or written twice, as a fuzzer would.
fn changed(seed: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    const TELLING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    let mut bytes = seed.to_vec();
    for _ in 0..=numbers.next(4) {
        let at = numbers.next(bytes.len());
        let end = at + numbers.next(bytes.len() - at);
        match numbers.next(8) {
            0 => bytes.truncate(at),
            1 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            2 => drop(bytes.drain(at..end)),
            3 | 4 if at < bytes.len() => bytes[at] = TELLING[numbers.next(TELLING.len())],
            _ if at < bytes.len() => bytes[at] = numbers.next(256) as u8,
            _ => bytes.push(numbers.next(256) as u8),
        }
    }
    bytes
}

/// Gives `target` its corpus, and each file `times` times changed.
pub(crate) fn replay(name: &str, times: u64, target: fn(&[u8])) {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = own
        .ancestors()
        .map(|folder| folder.join("tests/fuzz/corpus").join(name))
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| {
            panic!(
                "there is no tests/fuzz/corpus/{name} above {}",
                own.display()
            )
        });
    let mut files: Vec<_> = fs::read_dir(&corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", corpus.display());
    for file in files {
        let seed = fs::read(&file).unwrap();
        let object = |bytes: &[u8], how: &str| {
            if let Err(objection) = catch_unwind(|| target(bytes)) {
                eprintln!("{name}: {}{how}: {bytes:02x?}", file.display());
                resume_unwind(objection);
            }
        };
        object(&seed, "");
        let mut numbers = Numbers(seed.len() as u64);
        for nth in 0..times {
            object(&changed(&seed, &mut numbers), &format!(", change {nth}"));
        }
    }
}
