use proptest::prelude::*;

use super::*;

fn geometry(version: Version, cluster_bits: u32, extended_l2: bool) -> Geometry {
    Geometry {
        version,
        cluster_bits,
        extended_l2,
        compression_type: CompressionType::Zlib,
        file_bytes: 20 << cluster_bits,
        // Header, L1 table of one entry, refcount table.
        occupied: [
            0..1 << cluster_bits,
            3 << cluster_bits..(3 << cluster_bits) + 8,
            1 << cluster_bits..2 << cluster_bits,
        ],
    }
}

fn standard() -> Geometry {
    geometry(Version::V3, 16, false)
}

const CLUSTER: u64 = 1 << 16;

#[test]
fn l1_entries_lead_to_whole_tables_in_the_file() {
    let table = |host| Ok(L1Entry { table: Some(HostOffset(host)) });
    let new = |raw| L1Entry::new(raw, &standard());
    assert_eq!(new(0), Ok(L1Entry { table: None }));
    assert_eq!(new(COPIED), Ok(L1Entry { table: None }));
    assert_eq!(new(COPIED | (4 * CLUSTER)), table(4 * CLUSTER));
    assert_eq!(new(19 * CLUSTER), table(19 * CLUSTER));
    assert_eq!(new((4 * CLUSTER) | 1), Err(EntryFault::Reserved(1)));
    assert_eq!(new((4 * CLUSTER) | (1 << 62)), Err(EntryFault::Reserved(1 << 62)));
    assert_eq!(new((4 * CLUSTER) | (1 << 56)), Err(EntryFault::Reserved(1 << 56)));
    assert_eq!(new(4 * CLUSTER + 512), Err(EntryFault::Misaligned(HostOffset(4 * CLUSTER + 512))));
    for taken in [CLUSTER, 3 * CLUSTER] {
        assert_eq!(new(taken), Err(EntryFault::Overlap(HostOffset(taken))));
    }
    let outside = |host| Err(EntryFault::OutsideFile { host: HostOffset(host), file_bytes: 20 * CLUSTER });
    assert_eq!(new(20 * CLUSTER), outside(20 * CLUSTER));
    assert_eq!(new(OFFSET_MASK & !(CLUSTER - 1)), outside(OFFSET_MASK & !(CLUSTER - 1)));
    // A table that the file's end cuts off is none; a data cluster may be cut off.
    let mut cut = standard();
    cut.file_bytes -= 1;
    assert!(L1Entry::new(19 * CLUSTER, &cut).is_err());
    assert_eq!(L2Entry::new(19 * CLUSTER, 0, &cut), Ok(L2Entry::Data(HostOffset(19 * CLUSTER))));
}

#[test]
fn standard_entries() {
    let new = |raw| L2Entry::new(raw, 0, &standard());
    assert_eq!(new(0), Ok(L2Entry::Absent));
    assert_eq!(new(COPIED | (5 * CLUSTER)), Ok(L2Entry::Data(HostOffset(5 * CLUSTER))));
    assert_eq!(new(ZERO), Ok(L2Entry::Zero));
    assert_eq!(new(ZERO | COPIED | (5 * CLUSTER)), Ok(L2Entry::Zero));
    assert_eq!(new((5 * CLUSTER) | 2), Err(EntryFault::Reserved(2)));
    assert_eq!(new((5 * CLUSTER) | (1 << 61)), Err(EntryFault::Reserved(1 << 61)));
    assert!(matches!(new(ZERO | (20 * CLUSTER)), Err(EntryFault::OutsideFile { .. })));
    assert!(matches!(new(5 * CLUSTER + 4096), Err(EntryFault::Misaligned(_))));
    assert_eq!(new(3 * CLUSTER), Err(EntryFault::Overlap(HostOffset(3 * CLUSTER))));
    let v2 = geometry(Version::V2, 16, false);
    assert_eq!(L2Entry::new(ZERO, 0, &v2), Err(EntryFault::ZeroInV2));
    assert_eq!(L2Entry::new(5 * CLUSTER, 0, &v2), Ok(L2Entry::Data(HostOffset(5 * CLUSTER))));
}

#[test]
fn extended_entries() {
    let new = |raw, bitmap| L2Entry::new(raw, bitmap, &geometry(Version::V3, 16, true));
    let Ok(L2Entry::Subclusters(HostOffset(host), subclusters)) = new(5 * CLUSTER, 0b10 << 32 | 1 << 31 | 1)
    else {
        panic!("valid");
    };
    assert_eq!(host, 5 * CLUSTER);
    let kinds = [0, 1, 2, 31].map(|index| subclusters.kind(index));
    use SubclusterKind::{Absent, Data, Zero};
    assert_eq!(kinds, [Data, Zero, Absent, Data]);
    assert!(matches!(new(0, 1 << 63), Ok(L2Entry::Subclusters(HostOffset(0), _))));
    assert_eq!(new(ZERO | (5 * CLUSTER), 0), Err(EntryFault::ZeroInExtended));
    assert_eq!(new(5 * CLUSTER, 1 << 33 | 2), Err(EntryFault::AllocatedAndZero(1 << 33 | 2)));
    assert_eq!(new(0, 2), Err(EntryFault::AllocatedNowhere(2)));
    assert_eq!(new(COMPRESSED | (5 * CLUSTER), 4), Err(EntryFault::CompressedSubclusters(4)));
}

#[test]
fn compressed_descriptors_for_every_cluster_size() {
    for bits in 9..=21_u32 {
        let geometry = geometry(Version::V3, bits, false);
        let new = |host: u64, sectors: u64| {
            L2Entry::new(COMPRESSED | sectors << (62 - (bits - 8)) | host, 0, &geometry)
        };
        let is = |host, bytes| Ok(L2Entry::Compressed(CompressedCluster { host: HostOffset(host), bytes }));
        let host = 5 << bits;
        // Of all sectors that the field can tell.
        let most = (1 << (bits - 8)) - 1;
        assert_eq!(new(host, 0), is(host, 512));
        assert_eq!(new(host + 100, 0), is(host + 100, 412));
        assert_eq!(new(host + 511, most), is(host + 511, 1 + most * 512));
        // What would lie behind the file's end is left out.
        assert_eq!(new(geometry.file_bytes - 3, most), is(geometry.file_bytes - 3, 3));
        assert!(matches!(new(geometry.file_bytes, 0), Err(EntryFault::OutsideFile { .. })));
        assert!(matches!(new(0, 0), Err(EntryFault::Overlap(_))));
        assert!(matches!(new((3 << bits) + 4, 0), Err(EntryFault::Overlap(_))));
    }
    let small = geometry(Version::V3, 9, false);
    assert_eq!(L2Entry::new(COMPRESSED | 1 << 57 | 5000, 0, &small), Err(EntryFault::Reserved(1 << 57)));
}

#[test]
fn no_number_makes_an_entry_that_leads_outside() {
    let mut state = 1_u64;
    let mut next = || {
        // Knuth's MMIX generator, its upper bits.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ state >> 31
    };
    for _ in 0..200_000 {
        let bits = 9 + u32::try_from(next() % 13).expect("small");
        let extended = bits >= 14 && next() % 2 == 0;
        let geometry = geometry(Version::V3, bits, extended);
        // Few bits, so that some are valid.
        let (raw, bitmap) = (next() & next() & next(), next() & next());
        match L2Entry::new(raw, bitmap, &geometry) {
            Ok(L2Entry::Data(host)) => assert!(host.0 < geometry.file_bytes && host.0 > 0),
            Ok(L2Entry::Compressed(cluster)) => {
                assert!(cluster.bytes > 0 && cluster.bytes <= 2 << bits);
                assert!(cluster.host.0 + cluster.bytes <= geometry.file_bytes);
            }
            _ => {}
        }
        if let Ok(L1Entry { table: Some(host) }) = L1Entry::new(raw, &geometry) {
            assert!(host.0 + geometry.cluster_size() <= geometry.file_bytes);
        }
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_understood(
        bits in 9_u32..=21, extended in any::<bool>(), kind in 0..5, cluster in 4_u64..19,
        within in any::<u64>(), bytes in any::<u64>(), allocated in any::<u32>(), zero in any::<u32>()
    ) {
        let extended = extended && bits >= 14;
        let geometry = geometry(Version::V3, bits, extended);
        let size = geometry.cluster_size();
        let host = HostOffset(cluster * size);
        let subclusters = |allocated, zero| L2Entry::Subclusters(
            if allocated == 0 { HostOffset(0) } else { host },
            Subclusters::from_bits(allocated, zero).expect("disjoint"),
        );
        let packed = CompressedCluster { host: HostOffset(host.0 + within % size), bytes: 1 + bytes % size };
        let entry = match kind {
            0 => L2Entry::Absent,
            1 => L2Entry::Zero,
            2 => L2Entry::Data(host),
            3 if extended => subclusters(allocated, zero & !allocated),
            _ => L2Entry::Compressed(packed),
        };
        let (raw, bitmap) = entry.encode(bits, extended);
        let mut expected = match entry {
            L2Entry::Absent if extended => subclusters(0, 0),
            L2Entry::Zero if extended => subclusters(0, u32::MAX),
            L2Entry::Data(_) if extended => subclusters(u32::MAX, 0),
            entry => entry,
        };
        if let L2Entry::Compressed(cluster) = &mut expected {
            cluster.bytes = (packed.host.0 + packed.bytes).next_multiple_of(512) - packed.host.0;
        }
        prop_assert_eq!(L2Entry::new(raw, bitmap, &geometry), Ok(expected));
        prop_assert_eq!(raw & COPIED != 0, raw & OFFSET_MASK != 0 && raw & COMPRESSED == 0);
    }
}
