//! Cross-crate tests of shootdown live in `tests/`; the table of planted bugs is the program `races`, and `cost`
//! compares sources with their bare mechanisms.
