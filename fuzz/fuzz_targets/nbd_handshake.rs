//! The input is everything that a server says while an export is negotiated.
#![no_main]

use std::io::{self, Read, Write};

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::nbd::handshake::{Wanted, negotiate};

/// Says its script, hears nothing.
struct Server<'a>(&'a [u8]);

impl Read for Server<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|says: &[u8]| {
    let wanted = Wanted { export: "disk".into(), allocation: true };
    match negotiate(&mut Server(says), &wanted) {
        Ok(export) => {
            // What the client relies on without looking again.
            assert!(export.blocks.minimum.is_power_of_two());
            assert!(export.blocks.maximum >= export.blocks.minimum && export.blocks.maximum <= 32 << 20);
            assert!(export.blocks.maximum.is_multiple_of(export.blocks.minimum));
            assert!(i64::try_from(export.size).is_ok());
            assert!(export.structured || export.allocation.is_none());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
