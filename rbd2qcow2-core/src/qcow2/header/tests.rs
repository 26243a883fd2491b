use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::chain::tests::qemu_img_is_there;

/// Length of the sample file: header, refcount table, refcount block, and an L1 table of one entry.
const FILE_BYTES: u64 = 3 * 65536 + 8;

/// A version 3 header as QEMU writes it, with a backing file.
fn sample() -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(8, &200u64.to_be_bytes());
    put(16, &11u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3u64 << 16).to_be_bytes());
    put(48, &(1u64 << 16).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(112, &0xe279_2acau32.to_be_bytes());
    put(116, &5u32.to_be_bytes());
    put(120, b"qcow2");
    put(128, &0x6803_f857u32.to_be_bytes());
    put(132, &48u32.to_be_bytes());
    put(200, b"below.qcow2");
    bytes
}

/// The sample with the bytes at `offset` replaced.
fn with(offset: usize, field: &[u8]) -> Result<Header, HeaderError> {
    let mut bytes = sample();
    bytes[offset..offset + field.len()].copy_from_slice(field);
    Header::parse(&bytes, FILE_BYTES)
}

#[test]
fn a_header_is_understood() {
    let header = Header::parse(&sample(), FILE_BYTES).expect("valid");
    let expected = Header {
        version: Version::V3,
        cluster_bits: ClusterBits(16),
        virtual_size: 1 << 20,
        backing: Some(Backing { name: "below.qcow2".to_owned(), format: Some("qcow2".to_owned()) }),
        encryption: Encryption::None,
        l1_table: Table { offset: 3 << 16, entries: 1 },
        refcount_table: Table { offset: 1 << 16, entries: 8192 },
        refcount_order: 4,
        snapshots: 0,
        dirty: false,
        corrupt: false,
        external_data: false,
        compression_type: CompressionType::Zlib,
        extended_l2: false,
        compatible_features: 0,
        autoclear_features: 0,
        header_length: 112,
    };
    assert_eq!(header, expected);
    header.check_restore_point().expect("fit");
    assert_eq!(header.chain_backing().expect("in the directory"), Some("below.qcow2"));
}

#[test]
fn impossible_numbers_are_named() {
    let cases: [(usize, &[u8], &str); 22] = [
        (20, &8u32.to_be_bytes(), "cluster_bits"),
        (20, &22u32.to_be_bytes(), "cluster_bits"),
        (20, &u32::MAX.to_be_bytes(), "cluster_bits"),
        (24, &(513u64 << 20).to_be_bytes(), "size"),
        (24, &u64::MAX.to_be_bytes(), "size"),
        (32, &3u32.to_be_bytes(), "crypt_method"),
        (36, &0u32.to_be_bytes(), "size"),
        (36, &((4u32 << 20) + 1).to_be_bytes(), "l1_size"),
        (40, &0u64.to_be_bytes(), "l1_table_offset"),
        (40, &65537u64.to_be_bytes(), "l1_table_offset"),
        (48, &512u64.to_be_bytes(), "refcount_table_offset"),
        (56, &0u32.to_be_bytes(), "refcount_table_clusters"),
        (56, &129u32.to_be_bytes(), "refcount_table_clusters"),
        (8, &100u64.to_be_bytes(), "backing_file_offset"),
        (8, &u64::MAX.to_be_bytes(), "backing_file_offset"),
        (8, &65530u64.to_be_bytes(), "backing_file_size"),
        (16, &1024u32.to_be_bytes(), "backing_file_size"),
        (96, &7u32.to_be_bytes(), "refcount_order"),
        (100, &96u32.to_be_bytes(), "header_length"),
        (100, &113u32.to_be_bytes(), "header_length"),
        (100, &65544u32.to_be_bytes(), "header_length"),
        (116, &u32::MAX.to_be_bytes(), "extension length"),
    ];
    for (offset, bytes, expected) in cases {
        match with(offset, bytes) {
            Err(HeaderError::Field { field, .. }) => assert_eq!(field, expected, "{bytes:?} at {offset}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn features_are_told() {
    let incompatible = |bits: u64| with(72, &bits.to_be_bytes());
    assert!(incompatible(1).expect("valid").dirty);
    assert!(incompatible(2).expect("valid").corrupt);
    assert!(incompatible(4).expect("valid").external_data);
    assert!(incompatible(16).expect("valid").extended_l2);
    for bits in [1, 2, 4] {
        let unfit = incompatible(bits).expect("valid").check_restore_point();
        assert!(matches!(unfit, Err(HeaderError::Unfit { .. })), "{bits}");
    }
    assert!(with(32, &2u32.to_be_bytes()).expect("valid").check_restore_point().is_err());
    assert!(matches!(incompatible(1 << 5), Err(HeaderError::UnknownFeatures { bits: 32 })));
    assert!(matches!(incompatible(8), Err(HeaderError::Field { field: "compression_type", .. })));
    assert!(matches!(with(104, &[1]), Err(HeaderError::Field { field: "compression_type", .. })));
    let mut zstd = sample();
    (zstd[79], zstd[104]) = (8, 1);
    let header = Header::parse(&zstd, FILE_BYTES).expect("valid");
    assert_eq!(header.compression_type, CompressionType::Zstd);
    zstd[104] = 2;
    assert!(matches!(Header::parse(&zstd, FILE_BYTES), Err(HeaderError::Field { value: 2, .. })));
    assert_eq!(with(80, &1u64.to_be_bytes()).expect("valid").compatible_features, 1);
    assert_eq!(with(88, &5u64.to_be_bytes()).expect("valid").autoclear_features, 5);
}

/// QEMU refuses these, too: see `an_accepted_header_opens_in_qemu` of the check.
#[test]
fn what_is_not_there_is_checked_all_the_same() {
    let extension = |kind: u32, length: u32| {
        let bytes = [kind.to_be_bytes(), length.to_be_bytes()].concat();
        with(128, &bytes)
    };
    let no_name = |offset: u64| {
        let mut bytes = sample();
        bytes[8..16].copy_from_slice(&offset.to_be_bytes());
        bytes[16..20].fill(0);
        Header::parse(&bytes, FILE_BYTES)
    };
    let no_l1 = |offset: u64| {
        let mut bytes = sample();
        bytes[24..32].fill(0);
        bytes[36..40].fill(0);
        bytes[40..48].copy_from_slice(&offset.to_be_bytes());
        Header::parse(&bytes, FILE_BYTES)
    };
    let cases = [
        (with(64, &512u64.to_be_bytes()), "snapshots_offset"),
        (with(64, &(1u64 << 63).to_be_bytes()), "snapshots_offset"),
        (with(88, &2u64.to_be_bytes()), "autoclear_features"),
        (no_l1(512), "l1_table_offset"),
        (no_l1(1 << 63), "l1_table_offset"),
        (no_name(65537), "backing_file_offset"),
        // Between the data of the last extension and this, 4 bytes are left for the next.
        (no_name(188), "extension length"),
        (extension(extension::END, 65), "extension length"),
        (extension(extension::BACKING_FORMAT, 16), "extension length"),
        (extension(extension::BITMAPS, 16), "extension length"),
        (extension(extension::ENCRYPTION, 16), "extension type"),
    ];
    for (header, expected) in cases {
        match header {
            Err(HeaderError::Field { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    for header in [no_l1(0), no_l1(1 << 40), no_name(192), with(64, &(1u64 << 40).to_be_bytes())] {
        header.expect("valid");
    }
    extension(extension::BITMAPS, 24).expect("valid");
}

#[test]
fn subclusters_need_large_clusters_and_halve_what_an_l2_table_covers() {
    let mut bytes = sample();
    bytes[79] = 16;
    bytes[23] = 13;
    assert!(matches!(
        Header::parse(&bytes, FILE_BYTES),
        Err(HeaderError::Field { field: "cluster_bits", value: 13, .. })
    ));
    bytes[23] = 16;
    bytes[24..32].copy_from_slice(&(256u64 << 20).to_be_bytes());
    Header::parse(&bytes, FILE_BYTES).expect("256 MiB are what one table covers");
    bytes[24..32].copy_from_slice(&((256u64 << 20) + 512).to_be_bytes());
    assert!(matches!(Header::parse(&bytes, FILE_BYTES), Err(HeaderError::Field { field: "size", .. })));
}

#[test]
fn files_that_end_too_early_are_told() {
    for (file_bytes, what) in [(FILE_BYTES - 1, "the L1 table"), (131_071, "the L1 table")] {
        match Header::parse(&sample(), file_bytes) {
            Err(HeaderError::Truncated { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{other:?}"),
        }
    }
    for length in 0..65536 {
        let result = Header::parse(&sample()[..length], length as u64);
        let expected = if length < 4 {
            matches!(result, Err(HeaderError::NotQcow2))
        } else {
            matches!(result, Err(HeaderError::Truncated { .. }))
        };
        assert!(expected, "cut off at {length}: {result:?}");
    }
}

#[test]
fn other_files_are_no_qcow2() {
    assert!(matches!(with(0, b"QED\0"), Err(HeaderError::NotQcow2)));
    assert!(matches!(with(7, &[1]), Err(HeaderError::Version(1))));
    assert!(matches!(with(7, &[4]), Err(HeaderError::Version(4))));
}

#[test]
fn only_a_name_in_the_same_directory_is_a_chains_backing_file() {
    for name in ["/abs.qcow2\0", "../up.qcow2", "a/b.qcow2xx", "nbd:host:10", "json:{\"a\":1", "fat:disk.im"]
    {
        let name = &name.as_bytes()[..11.min(name.len())];
        match with(200, name) {
            Ok(header) => {
                let backing = header.chain_backing();
                assert!(matches!(backing, Err(HeaderError::ForeignBacking { .. })), "{backing:?}");
            }
            Err(error) => assert!(matches!(error, HeaderError::NotText(_)), "{error}"),
        }
    }
    assert!(matches!(with(200, b"\xff"), Err(HeaderError::NotText("backing file name"))));
    assert!(matches!(with(120, b"\xff"), Err(HeaderError::NotText("backing format"))));
    for (offset, bytes) in [(120, b"raw\x20\x20"), (112, b"\0\0\0\0\0")] {
        let backing = with(offset, bytes).expect("valid");
        let refused = backing.chain_backing();
        assert!(matches!(refused, Err(HeaderError::BackingFormat { .. })), "{refused:?}");
    }
    let none = with(8, &0u64.to_be_bytes()).expect("valid");
    assert_eq!((none.backing.as_ref(), none.chain_backing().expect("none")), (None, None));
    assert_eq!(with(16, &0u32.to_be_bytes()).expect("valid").backing, None);
}

#[test]
fn only_files_are_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("layer");
    assert!(matches!(Header::read(&path), Err(HeaderError::Read(_))));
    assert!(matches!(Header::read(directory.path()), Err(HeaderError::NotARegularFile)));
    assert!(matches!(Header::read(Path::new("/dev/zero")), Err(HeaderError::NotARegularFile)));
    std::os::unix::fs::symlink("/dev/zero", &path).expect("a link");
    assert!(matches!(Header::read(&path), Err(HeaderError::NotARegularFile)));
}

/// Makes a file with `qemu-img create` and reads its header.
fn created(options: &str, arguments: &[&str]) -> Header {
    created_of_size(3 << 30, options, arguments)
}

fn created_of_size(virtual_size: u64, options: &str, arguments: &[&str]) -> Header {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("layer.qcow2");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-u", "-o", options]).args(arguments);
    let output = command.arg(&path).arg(virtual_size.to_string()).output().expect("qemu-img runs");
    assert!(output.status.success(), "{output:?}");
    let header = Header::read(&path).expect("valid");
    assert_eq!(header.virtual_size, virtual_size);
    header
}

#[test]
fn what_qemu_creates_is_understood() {
    if !qemu_img_is_there() {
        return;
    }
    let old = created("compat=0.10", &["-b", "below.qcow2", "-F", "qcow2"]);
    assert_eq!((old.version, old.refcount_order, old.header_length), (Version::V2, 4, 72));
    assert_eq!(old.chain_backing().expect("in the directory"), Some("below.qcow2"));
    let new = created("extended_l2=on,compression_type=zstd,refcount_bits=1,lazy_refcounts=on", &[]);
    assert!(new.extended_l2 && new.version == Version::V3 && new.compatible_features == 1);
    assert_eq!((new.compression_type, new.refcount_order), (CompressionType::Zstd, 0));
    assert_eq!((new.backing.as_ref(), new.chain_backing().expect("none")), (None, None));
    // RBD images may be empty, or larger than what small clusters can hold.
    for (virtual_size, options) in
        [(0, "cluster_size=64k"), (512, "cluster_size=2M"), (1 << 50, "cluster_size=2M")]
    {
        created_of_size(virtual_size, options, &[]).check_restore_point().expect("fit");
    }
    for size in [512u64, 4096, 65536, 2 << 20] {
        let header = created(&format!("cluster_size={size}"), &["-b", "below.raw", "-F", "raw"]);
        assert_eq!(header.cluster_bits, ClusterBits::from_size(size).expect("valid"));
        assert!(matches!(header.chain_backing(), Err(HeaderError::BackingFormat { .. })));
    }
}

#[test]
fn cluster_sizes_are_checked() {
    assert_eq!(ClusterBits::from_size(65536).map(|bits| (bits.bits(), bits.size())), Some((16, 65536)));
    for size in [0, 256, 513, 65535, 4 << 20, u64::MAX] {
        assert_eq!(ClusterBits::from_size(size), None);
    }
}

proptest! {
    /// Whatever is accepted keeps the promises of the types; nothing panics.
    #[test]
    fn damaged_headers_are_survived(
        changes in prop::collection::vec((0..240usize, any::<u8>()), 1..6),
        length in prop::option::of(0..300usize),
        file_bytes in prop_oneof![Just(FILE_BYTES), any::<u64>()],
    ) {
        let mut bytes = sample();
        for (offset, value) in changes {
            bytes[offset] = value;
        }
        bytes.truncate(length.unwrap_or(bytes.len()));
        if let Ok(header) = Header::parse(&bytes, file_bytes) {
            for table in [header.l1_table, header.refcount_table] {
                prop_assert!(table.entries == 0 || table.offset + table.entries * 8 <= file_bytes);
            }
            prop_assert!(header.refcount_order <= 6);
            if let Ok(Some(name)) = header.chain_backing() {
                prop_assert!(!name.contains(['/', ':', '\0']));
            }
        }
    }
}

prop_compose! {
    /// Any header that this program could write, of a file that is long enough.
    fn headers()(
        bits in 9_u32..=21, zstd in any::<bool>(), extended_l2 in any::<bool>(), entries in 1_u64..2000,
        fill in 0.0..=1.0, name in prop::option::of("[a-z0-9%@.]{1,300}"), order in 0_u32..=6, flags in 0_u8..8
    ) -> Header {
        let cluster_bits = ClusterBits::new(bits).expect("in range");
        let extended_l2 = extended_l2 && bits >= 14;
        let coverage = cluster_bits.size() / if extended_l2 { 16 } else { 8 } * cluster_bits.size();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss,
            reason = "any size does")]
        let virtual_size = ((entries * coverage) as f64 * fill) as u64;
        let mut header = Header {
            version: Version::V3,
            cluster_bits,
            virtual_size: virtual_size.min(entries * coverage),
            backing: name.map(|name| Backing { name, format: Some("qcow2".to_owned()) }),
            encryption: Encryption::None,
            l1_table: Table { offset: cluster_bits.size(), entries },
            refcount_table: Table { offset: 1 << 30, entries: cluster_bits.size() / 8 },
            refcount_order: order,
            snapshots: 0,
            dirty: flags & 1 != 0,
            corrupt: flags & 2 != 0,
            external_data: flags & 4 != 0,
            compression_type: if zstd { CompressionType::Zstd } else { CompressionType::Zlib },
            extended_l2,
            compatible_features: flags.into(),
            autoclear_features: 0,
            header_length: 0,
        };
        header.header_length = header.encoded_length();
        header
    }
}

proptest! {
    #[test]
    fn what_is_written_is_parsed(header in headers()) {
        match header.to_bytes() {
            Some(bytes) => prop_assert_eq!(Header::parse(&bytes, 1 << 32).unwrap(), header),
            // A long name in a small cluster.
            None => prop_assert_eq!(header.cluster_bits.size(), 512),
        }
    }
}
