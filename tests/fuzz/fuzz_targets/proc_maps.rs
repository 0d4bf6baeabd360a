#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shootdown::fuzz::proc_maps(bytes));
