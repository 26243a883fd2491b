//! The header of a file that calls itself qcow2.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::qcow2::header::Header;

fuzz_target!(|bytes: &[u8]| {
    // The first two bytes stretch the file beyond its header: tables need not be part of the input.
    let Some((stretch, bytes)) = bytes.split_first_chunk() else {
        return;
    };
    let file_bytes = bytes.len() as u64 + (u64::from(u16::from_be_bytes(*stretch)) << 9);
    let Ok(header) = Header::read_from(bytes, file_bytes) else {
        return;
    };
    for table in [header.l1_table, header.refcount_table] {
        assert!(table.entries == 0 || table.offset + table.entries * 8 <= file_bytes);
    }
    assert!(header.refcount_order <= 6);
    if let Ok(Some(name)) = header.chain_backing() {
        assert!(!name.contains(['/', ':', '\0']));
    }
});
