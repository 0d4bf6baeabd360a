#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shootdown::fuzz::seccomp_call(bytes));
