//! Cross-crate tests of shootdown live in `tests/`; the table of planted bugs is the program `races`.
