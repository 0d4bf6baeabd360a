//! Cross-crate tests of shootdown live in `tests/`.
