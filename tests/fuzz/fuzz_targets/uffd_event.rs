#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shootdown::fuzz::uffd_event(bytes));
