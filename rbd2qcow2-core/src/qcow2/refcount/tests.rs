use proptest::prelude::*;

use super::*;
use crate::qcow2::header::Header;

fn width(order: u32) -> RefcountWidth {
    RefcountWidth::new(order).expect("up to 6")
}

/// The bits of `bytes` in the order in which the format counts them: of widths below 8 from the lowest
/// bit of each byte on, else from the highest bit of the first byte on.
fn bit(bytes: &[u8], width_bits: usize, index: usize, place: usize) -> bool {
    // `place` counts from the refcount's lowest bit.
    let (at, shift) = if width_bits < 8 {
        let bit = index * width_bits + place;
        (bit / 8, bit % 8)
    } else {
        let last_byte = (index + 1) * width_bits / 8 - 1;
        (last_byte - place / 8, place % 8)
    };
    bytes[at] & (1 << shift) != 0
}

fn naive(bytes: &[u8], width_bits: usize, index: usize) -> u64 {
    (0..width_bits).map(|place| u64::from(bit(bytes, width_bits, index, place)) << place).sum()
}

proptest! {
    #[test]
    fn refcounts_are_those_of_single_bits(order in 0..=6_u32, bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let width = width(order);
        let bits = width.bits() as usize;
        let refcounts = Refcounts::new(width, &bytes);
        let expected_len = bytes.len() * 8 / bits;
        prop_assert_eq!(refcounts.len(), expected_len);
        prop_assert_eq!(refcounts.is_empty(), expected_len == 0);
        let expected: Vec<u64> = (0..refcounts.len()).map(|index| naive(&bytes, bits, index)).collect();
        prop_assert_eq!(refcounts.iter().collect::<Vec<_>>(), expected);
        prop_assert_eq!(refcounts.get(refcounts.len()), None);
        prop_assert_eq!(refcounts.get(usize::MAX), None);
    }

    #[test]
    fn what_is_put_is_there_and_nothing_else_changes(
        order in 0..=6_u32,
        bytes in prop::collection::vec(any::<u8>(), 8..64),
        index in any::<prop::sample::Index>(),
        value in any::<u64>(),
    ) {
        let width = width(order);
        let index = index.index(Refcounts::new(width, &bytes).len());
        let value = value & width.max();
        let mut changed = bytes.clone();
        prop_assert!(put(&mut changed, width, index, value));
        let mut expected: Vec<u64> = Refcounts::new(width, &bytes).iter().collect();
        expected[index] = value;
        prop_assert_eq!(Refcounts::new(width, &changed).iter().collect::<Vec<_>>(), expected);
        // Nor do bytes behind the last whole refcount.
        let whole = Refcounts::new(width, &bytes).len() * width.bits() as usize / 8;
        prop_assert_eq!(&changed[whole..], &bytes[whole..]);
    }
}

#[test]
fn what_does_not_fit_is_not_put() {
    let mut bytes = [0xa5; 8];
    for order in 0..=6 {
        let width = width(order);
        let behind = Refcounts::new(width, &bytes).len();
        assert!(!put(&mut bytes, width, behind, 0) && !put(&mut bytes, width, usize::MAX, 0));
        if let Some(too_large) = width.max().checked_add(1) {
            assert!(!put(&mut bytes, width, 0, too_large));
        }
    }
    assert_eq!(bytes, [0xa5; 8]);
    assert_eq!(RefcountWidth::new(7), None);
}

#[test]
fn a_block_describes_so_many_clusters() {
    assert_eq!(width(6).per_block(512), 64);
    assert_eq!(width(4).per_block(65536), 32768);
    assert_eq!(width(0).per_block(2 << 20), 1 << 24);
}

const CLUSTER: u64 = 1 << 16;

/// Of a file of 20 clusters: header, refcount table, a block, and an L1 table of one entry.
fn geometry() -> Geometry {
    let mut bytes = vec![0; 104];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    let header = Header::parse(&bytes, 20 * CLUSTER).expect("valid");
    assert_eq!(RefcountWidth::of(&header), width(4));
    Geometry::new(&header, 20 * CLUSTER)
}

#[test]
fn table_entries_lead_to_whole_blocks_in_the_file() {
    let new = |raw| RefcountEntry::new(raw, &geometry());
    for (raw, block) in [(0, None), (2 * CLUSTER, Some(2 * CLUSTER)), (19 * CLUSTER, Some(19 * CLUSTER))] {
        let entry = new(raw).expect("valid");
        assert_eq!(entry, RefcountEntry { block: block.map(HostOffset) });
        assert_eq!(entry.to_raw(), raw);
    }
    for bit in 0..9 {
        assert_eq!(new((2 * CLUSTER) | (1 << bit)), Err(EntryFault::Reserved(1 << bit)));
    }
    assert_eq!(new(2 * CLUSTER + 512), Err(EntryFault::Misaligned(HostOffset(2 * CLUSTER + 512))));
    for taken in [CLUSTER, 3 * CLUSTER] {
        assert_eq!(new(taken), Err(EntryFault::Overlap(HostOffset(taken))));
    }
    for outside in [20 * CLUSTER, 1 << 55, 1 << 56, 1 << 63, u64::MAX << 16] {
        let fault = EntryFault::OutsideFile { host: HostOffset(outside), file_bytes: 20 * CLUSTER };
        assert_eq!(new(outside), Err(fault));
    }
    let mut cut = geometry();
    cut.file_bytes -= 1;
    assert!(matches!(RefcountEntry::new(19 * CLUSTER, &cut), Err(EntryFault::OutsideFile { .. })));
}
