#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shootdown_hw_model::fuzz::gru_registers(bytes));
