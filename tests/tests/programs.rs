//! Random programs through the whole stack against a plain interpreter, from the corpus of the fuzz target and at random.

#[path = "../fuzz/replay.rs"]
mod replay;

use proptest::prelude::*;
use shootdown_gru::Plant;
use shootdown_tests::program::{program, program_with};

#[test]
fn the_corpus_of_programs_agrees_with_the_interpreter() {
    replay::replay("gru_program", 16, program);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_programs_agree_with_the_interpreter(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        program(&bytes);
    }
}

/// The programs can tell: with a bug in the driver one of a few differs.
#[test]
fn a_driver_that_does_not_flush_is_found() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    for plant in [Plant::NO_FLUSH_ON_UNMAP, Plant::ASID_REUSED] {
        let found = (0..64).any(|seed| {
            let mut rng = SmallRng::seed_from_u64(seed);
            let bytes: Vec<u8> = (0..3000).map(|_| rng.random()).collect();
            let result = std::panic::catch_unwind(|| program_with(&bytes, plant));
            result.is_err()
        });
        assert!(found, "{plant:?} is not found");
    }
}
