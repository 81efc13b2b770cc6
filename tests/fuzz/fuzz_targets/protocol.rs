//! Every entry of the wire format: the first byte says which.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else { return };
    let entries = kornak_protocol::fuzz::ENTRIES;
    entries[usize::from(*which) % entries.len()].1(data);
});
