//! What must not compile: the witnesses cannot be forged, kept, or carried to another thread.

#[test]
fn what_a_witness_forbids_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
