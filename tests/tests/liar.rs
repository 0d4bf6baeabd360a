//! A chiplet that lies, from the corpus of the fuzz target and at random.

#[path = "../fuzz/replay.rs"]
mod replay;

use proptest::prelude::*;
use shootdown_tests::liar::liar;

#[test]
fn no_lie_of_the_corpus_hangs_leaks_or_reaches_anything() {
    replay::replay("gru_liar", 4, liar);
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn no_random_lie_hangs_leaks_or_reaches_anything(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        liar(&bytes);
    }
}
