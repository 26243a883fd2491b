//! Files that claim too much, and the bounds of what a check does.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::qcow2::file::ReadAt;

/// A file of a few pieces, zero elsewhere. Counts the bytes that are read.
struct Sparse {
    pieces: Vec<Change>,
    read: Arc<AtomicU64>,
}

impl ReadAt for Sparse {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (at, bytes) in &self.pieces {
            let (start, stop) = (offset.max(*at), end.min(at + bytes.len() as u64));
            if start < stop {
                let within = |from: u64, to: u64| usize::try_from(to - from).expect("in memory");
                let source = &bytes[within(*at, start)..within(*at, stop)];
                buf[within(offset, start)..within(offset, stop)].copy_from_slice(source);
            }
        }
        Ok(buf.len())
    }
}

/// The header of a file with clusters of `1 << cluster_bits` bytes.
fn header(cluster_bits: u32, l1: (u64, u32), reftable: (u64, u32)) -> Change {
    let mut bytes = vec![0; 512];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &cluster_bits.to_be_bytes());
    put(36, &l1.1.to_be_bytes());
    put(40, &l1.0.to_be_bytes());
    put(48, &reftable.0.to_be_bytes());
    put(56, &reftable.1.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    (0, bytes)
}

fn check_sparse(pieces: Vec<Change>, length: u64) -> (Structure, u64, Vec<Progress>) {
    let read = Arc::new(AtomicU64::new(0));
    let source = Sparse { pieces, read: Arc::clone(&read) };
    let layer = LayerReader::from_source(Path::new("sparse"), source, length).expect("valid");
    let mut told = Vec::new();
    let found = check(&layer, &Cancel::new(), &mut |progress| told.push(progress)).expect("readable");
    (found, read.load(Ordering::Relaxed), told)
}

#[test]
fn a_table_that_is_named_often_is_read_once() {
    const ENTRIES: u64 = 1 << 22;
    let cluster = 2 << 20;
    let l1 = cluster * 2;
    let table = l1 + ENTRIES * 8;
    let entries = (COPIED | table).to_be_bytes().repeat(1 << 22);
    let length = table + cluster * 2;
    let data = number(table, table + cluster);
    let pieces = vec![header(21, (l1, 1 << 22), (cluster, 1)), (l1, entries), data];
    let (found, read, told) = check_sparse(pieces, length);
    assert_eq!(found.errors.len(), FINDINGS_KEPT);
    assert!(found.error_count >= ENTRIES * 2 - 1, "{}", found.error_count);
    // As if the table had been read as often as it is named.
    assert_eq!(found.figures.data, ENTRIES);
    let last = told.last().expect("tables");
    assert_eq!((told.len(), last.done, last.total), (1 << 22, ENTRIES, ENTRIES));
    assert!(read < 4 * length, "{read} bytes of {length}");
}

#[test]
fn emptiness_is_passed_over() {
    // A pebibyte of clusters of 512 bytes, with data at its end.
    let length = 1 << 50;
    let l1 = 1024;
    let table = 1536;
    let data = length - 512;
    let pieces = vec![
        header(9, (l1, 1), (512, 1)),
        number(l1, COPIED | table),
        number(table, COPIED | data),
        number(512, 2048),
        // Refcounts of header, refcount table, L1 table, L2 table and refcount block.
        (2048, [0, 1].repeat(5)),
    ];
    let (mut found, read, told) = check_sparse(pieces, length);
    assert!(read < 65536, "{read} bytes");
    let copied = found.errors.remove(0);
    assert!(matches!(copied, Finding::CopiedSet { host, .. } if host == HostOffset(data)), "{copied}");
    let host = HostOffset(data);
    assert_eq!(found.errors, [Finding::RefcountTooSmall { host, stored: 0, counted: 1 }]);
    assert_eq!((found.leak_count, found.figures.end, found.figures.data), (0, length, 1));
    // Two passes, and never more than was promised.
    assert_eq!(told.len(), 2);
    assert!(told.iter().all(|progress| progress.done <= progress.total));
    assert!(told.windows(2).all(|pair| pair[0].done < pair[1].done && pair[0].total >= pair[1].total));
}

#[test]
fn refcount_tables_that_claim_everything_are_survived() {
    for order in [0u32, 6] {
        let cluster = 2_u64 << 20;
        let length = cluster * 8;
        let block = cluster * 6;
        // As many entries as there may be, all of them for the same block.
        let entries = block.to_be_bytes().repeat(1 << 20);
        let mut first = header(21, (0, 0), (cluster, 4));
        first.1[96..100].copy_from_slice(&order.to_be_bytes());
        let (found, read, _) = check_sparse(vec![first, (cluster, entries)], length);
        assert!(found.error_count >= (1 << 20) - 1);
        assert!(read < 4 * length, "{read} bytes of {length}");
    }
}

#[test]
fn uses_without_number_are_told() {
    // Every entry of many tables is compressed data of the same cluster.
    let tables = 600;
    let (l1, packed, block) = (1024, 512 * 20, 512 * 21);
    let first = 512 * 64;
    let entries: Vec<u8> = (0..tables).flat_map(|index: u64| (first + index * 512).to_be_bytes()).collect();
    let mut pieces = vec![header(9, (l1, 600), (512, 1)), (l1, entries), number(512, block)];
    for index in 0..tables {
        let full = (1u64 << 62 | packed).to_be_bytes().repeat(64);
        pieces.push((first + index * 512, full));
    }
    let (found, ..) = check_sparse(pieces, 512 * 702);
    assert_eq!(found.figures.compressed, 600 * 64);
    assert!(found.errors.contains(&Finding::TooManyUses { host: HostOffset(packed) }), "{found:#?}");
    // Compressed data may share. All refcounts are 0: of header, refcount table, ten clusters of L1
    // table, refcount block and the tables.
    assert!(!found.errors.iter().any(|finding| matches!(finding, Finding::Shared { .. })));
    assert_eq!(found.error_count, 1 + 13 + tables);
}

#[test]
fn passes_are_numbered() {
    // An entry for each of 32 clusters, far from each other and from the first pass.
    let far = |index: u64| (index + 1) << 40;
    let entries = (0..32).flat_map(|index| (COPIED | far(index)).to_be_bytes()).collect();
    let pieces = vec![header(9, (1024, 1), (512, 1)), number(1024, COPIED | 1536), (1536, entries)];
    let source = Sparse { pieces, read: Arc::default() };
    let layer = LayerReader::from_source(Path::new("sparse"), source, 1 << 48).expect("valid");
    for passes in [1, 10, 32, 33] {
        let limits = Limits { window_clusters: 1 << 10, passes };
        let mut told = 0;
        let mut progress = |progress: Progress| told = progress.done;
        let found = Walk::new(&layer, &Cancel::new(), &mut progress, limits).run().expect("readable");
        assert_eq!(told, passes);
        let scattered = Finding::Scattered { host: HostOffset(far(passes - 1)) };
        assert_eq!(found.errors.last() == Some(&scattered), passes < 33, "{passes}");
    }
}

#[test]
fn what_is_used_is_worth_passes() {
    // One L2 table that is full, of clusters of which each but the first four has a window of its own.
    let far = |index: u64| (index + 1) << 40;
    let place = |index: u64| if index < 4 { 4096 + index * 512 } else { far(index) };
    let entries = (0..64).flat_map(|index| place(index).to_be_bytes()).collect();
    let pieces = vec![header(9, (1024, 1), (512, 1)), number(1024, 1536), (1536, entries)];
    let source = Sparse { pieces, read: Arc::default() };
    let layer = LayerReader::from_source(Path::new("sparse"), source, 1 << 48).expect("valid");
    // 68 clusters are used: header, two tables, the L2 table and what it names. They lie in 61 windows of
    // 64 clusters, or in 62 of 8.
    for (window_clusters, passes, enough) in [(64, 57, true), (64, 56, false), (8, 30, true), (8, 29, false)]
    {
        let limits = Limits { window_clusters, passes };
        let found = Walk::new(&layer, &Cancel::new(), &mut |_| (), limits).run().expect("readable");
        let scattered = found.errors.iter().any(|finding| matches!(finding, Finding::Scattered { .. }));
        assert_eq!(scattered, !enough, "{window_clusters} clusters, {passes} passes");
    }
}

#[test]
fn a_stop_is_heeded() {
    let pieces = vec![header(9, (1024, 1), (512, 1))];
    let source = Sparse { pieces, read: Arc::default() };
    let layer = LayerReader::from_source(Path::new("sparse"), source, 4096).expect("valid");
    let cancel = Cancel::new();
    cancel.set();
    assert!(matches!(check(&layer, &cancel, &mut |_| ()), Err(CheckError::Cancelled)));
}

/// Checks bytes in passes of so many clusters.
fn in_windows(bytes: &[u8], clusters: u64) -> Result<Structure, CheckError> {
    let layer = LayerReader::from_source(Path::new("sample"), bytes.to_vec(), bytes.len() as u64)?;
    Walk::new(&layer, &Cancel::new(), &mut |_| (), Limits { window_clusters: clusters, passes: u64::MAX })
        .run()
}

#[test]
fn leaks_are_found_where_nothing_is_used() {
    // A block with refcounts for 256 clusters, 10000 clusters behind everything else.
    let entry = 40;
    let counts = [0, 1].repeat(256);
    let pieces = vec![header(9, (0, 0), (512, 1)), number(512 + entry * 8, 1024), (1024, counts)];
    for clusters in [20_000, 256 * 40 + 7] {
        let length = 512 * clusters;
        let source = Sparse { pieces: pieces.clone(), read: Arc::default() };
        let layer = LayerReader::from_source(Path::new("sparse"), source, length).expect("valid");
        for window_clusters in [8, 64, 1 << 10, 1 << 20] {
            let limits = Limits { window_clusters, passes: 4096 };
            let found = Walk::new(&layer, &Cancel::new(), &mut |_| (), limits).run().expect("readable");
            let host = HostOffset(256 * entry * 512);
            assert_eq!(found.leaks[0], Finding::Leak { host, stored: 1, counted: 0 });
            assert_eq!(found.leak_count, (clusters - 256 * entry).min(256));
            // Header, refcount table and block have no refcount.
            assert_eq!((found.error_count, found.figures.tables), (3, 3));
            assert_eq!(found.figures.end, length.min(512 * 256 * (entry + 1)));
        }
    }
}

#[test]
fn several_passes_find_what_one_does() {
    const WINDOW: u64 = 8;
    let Some(tools) = qemu() else {
        return;
    };
    for (round, variant) in VARIANTS.into_iter().chain(every_width()).enumerate() {
        if variant.cluster > 65536 {
            continue;
        }
        let mut random = Random::new(0xa55 + round as u64);
        let directory = tempfile::tempdir().expect("a directory");
        make(&tools, directory.path(), "sample", None, variant, (1 << 20) + 512, &mut random);
        churn(directory.path(), "sample", (1 << 20) + 512, &mut random);
        let bytes = std::fs::read(directory.path().join("sample")).expect("readable");
        assert!(bytes.len() as u64 / variant.cluster > WINDOW, "{variant:?} has but one window");
        // Behind the header's fields.
        for flips in 0..12 {
            let mut changed = bytes.clone();
            for _ in 0..flips {
                let at = 112 + random.below(bytes.len() as u64 - 112);
                changed[usize::try_from(at).expect("in memory")] ^= 1 << random.below(8);
            }
            let cut = if flips % 3 == 2 { random.below(bytes.len() as u64 / 8) } else { 0 };
            changed.truncate(bytes.len() - usize::try_from(cut).expect("in memory"));
            let (Ok(mut one), Ok(mut several)) =
                (in_windows(&changed, 1 << 20), in_windows(&changed, WINDOW))
            else {
                assert!(in_windows(&changed, WINDOW).is_err());
                continue;
            };
            // One after the other, but not in the same order. What is kept differs where much is found.
            for found in [&mut one, &mut several] {
                found.errors.sort_by_key(|finding| format!("{finding:?}"));
            }
            if one.error_count > FINDINGS_KEPT as u64 {
                several.errors.clone_from(&one.errors);
            }
            assert_eq!(one, several, "{variant:?}, {flips} flips");
        }
    }
}

#[test]
fn changed_bits_yield_a_result() {
    let Some(tools) = qemu() else {
        return;
    };
    for (round, variant) in VARIANTS.into_iter().filter(|variant| variant.cluster <= 65536).enumerate() {
        let mut random = Random::new(0xb175 + round as u64);
        let directory = tempfile::tempdir().expect("a directory");
        make(&tools, directory.path(), "sample", None, variant, 200_000, &mut random);
        let bytes = std::fs::read(directory.path().join("sample")).expect("readable");
        for _ in 0..200 {
            let mut changed = bytes.clone();
            for _ in 0..1 + random.below(20) {
                // Half of them in the header and the tables behind it.
                let most = bytes.len() as u64;
                let most = if random.below(2) == 0 { most.min(variant.cluster * 4) } else { most };
                let at = random.below(most);
                changed[usize::try_from(at).expect("in memory")] ^= 1 << random.below(8);
            }
            let _ = in_windows(&changed, 1 << 20);
        }
    }
}
