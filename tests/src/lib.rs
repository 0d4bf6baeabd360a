//! Cross-crate tests of shootdown: what holds for random programs through the whole stack ([`program`]) and for chiplets that
//! lie at random ([`liar`]), as functions of bytes that property tests and fuzz targets share. Other tests live in `tests/`; the table of
//! planted bugs is the program `races`, and `cost` compares sources with their bare mechanisms.

pub mod liar;
pub mod program;
