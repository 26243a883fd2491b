//! Entries of the L1 and L2 tables, any numbers under any header: what is accepted is within the
//! file, and what the specification says of the same numbers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::qcow2::header::Header;
use rbd2qcow2_core::qcow2::table::{EntryFault, Geometry, L1Entry, L2Entry, SubclusterKind, Subclusters};
use rbd2qcow2_fuzz::naive::{Cell, Fault, Head, Refused};

/// Length of the header in the input. The file's length follows, 8 bytes, then entries.
const HEADER: usize = 112;

/// Most entries of an input that are looked at.
const ENTRIES: usize = 256;

fuzz_target!(|bytes: &[u8]| {
    let Some((stated, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return;
    };
    let Some((length, entries)) = rest.split_first_chunk() else {
        return;
    };
    // No file is longer than this.
    let file_bytes = u64::from_be_bytes(*length) & (u64::MAX >> 1);
    // The smallest cluster, with no extensions and no backing file.
    let mut first = [0; 512];
    first[..HEADER].copy_from_slice(stated);
    first[8..16].fill(0);
    let (header, head) = match (Header::parse(&first, file_bytes), Head::parse(&first, file_bytes)) {
        (Ok(header), Ok(head)) => (header, head),
        (Ok(header), Err(fault)) => panic!("accepted in spite of {fault:?}: {header:?}"),
        (Err(error), Ok(head)) => {
            assert!(head.may_be_refused(&error, file_bytes), "refused: {error}, {head:?}");
            return;
        }
        (Err(_), Err(_)) => return,
    };
    // Without an L1 table there is no entry to be read.
    if head.l1_entries == 0 {
        return;
    }
    let geometry = Geometry::new(&header, file_bytes);
    assert_eq!(geometry.l2_coverage(), head.coverage());
    // As they stand in the tables.
    for entry in entries.chunks_exact(if head.extended() { 16 } else { 8 }).take(ENTRIES) {
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        let entry =
            Entry { head: &head, geometry: &geometry, raw: number(entry), bitmap: number(&entry[8..]) };
        entry.check_l1();
        entry.check_l2();
    }
});

struct Entry<'a> {
    head: &'a Head,
    geometry: &'a Geometry,
    raw: u64,
    bitmap: u64,
}

impl Entry<'_> {
    fn check_l1(&self) {
        let found = L1Entry::new(self.raw, self.geometry);
        let expected = self.head.l1(self.raw, self.geometry.file_bytes);
        if let (Ok(found), Some(table)) = (found, self.agreed(&found, expected)) {
            assert_eq!(found.table.map(|host| host.0), table);
        }
    }

    fn check_l2(&self) {
        let found = L2Entry::new(self.raw, self.bitmap, self.geometry);
        let count = if self.head.extended() { 32 } else { 1 };
        for index in 0..count {
            let expected = self.head.l2(self.raw, self.bitmap, index, self.geometry.file_bytes);
            if let (Ok(found), Some(cell)) = (found, self.agreed(&found, expected)) {
                self.check_cell(found, index, cell);
            }
        }
    }

    /// What is expected where both accept the entry. That one of them does not must be for the rules
    /// that only the library has.
    fn agreed<F: std::fmt::Debug, E>(
        &self,
        found: &Result<F, EntryFault>,
        expected: Result<(E, Refused), Fault>,
    ) -> Option<E> {
        let at = || format!("{:#x}, {:#x}, {found:?}, {:?}", self.raw, self.bitmap, self.head);
        match (found, expected) {
            (Ok(_), Ok((expected, refused))) => {
                assert!(!refused.any(), "{refused:?}: {}", at());
                Some(expected)
            }
            (Ok(_), Err(fault)) => panic!("{fault:?}: {}", at()),
            (Err(fault), Ok((_, refused))) => {
                let known = match fault {
                    EntryFault::OutsideFile { .. } => refused.behind_end,
                    EntryFault::Overlap(_) => refused.overlap,
                    _ => false,
                };
                assert!(known, "{refused:?}: {}", at());
                None
            }
            (Err(_), Err(_)) => None,
        }
    }

    fn check_cell(&self, found: L2Entry, index: u32, expected: Cell) {
        let in_file = |host: u64| {
            assert!(host < self.geometry.file_bytes && host.is_multiple_of(self.geometry.cluster_size()));
            Cell::Data(host)
        };
        let cell = match found {
            L2Entry::Absent => Cell::Absent,
            L2Entry::Zero => Cell::Zero,
            L2Entry::Data(host) => in_file(host.0),
            L2Entry::Subclusters(host, subclusters) => match kind(subclusters, index) {
                SubclusterKind::Data => in_file(host.0),
                SubclusterKind::Zero => Cell::Zero,
                SubclusterKind::Absent => Cell::Absent,
            },
            L2Entry::Compressed(packed) => {
                assert!((1..=2 * self.geometry.cluster_size()).contains(&packed.bytes));
                assert!(packed.host.0 + packed.bytes <= self.geometry.file_bytes);
                Cell::Compressed(packed.host.0, packed.bytes)
            }
        };
        assert_eq!(cell, expected, "{:#x}, {:#x}, {:?}", self.raw, self.bitmap, self.head);
    }
}

fn kind(subclusters: Subclusters, index: u32) -> SubclusterKind {
    subclusters.kind(index.into())
}
