#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kornak_proxy::session::fuzz::fuzz_departure(data));
