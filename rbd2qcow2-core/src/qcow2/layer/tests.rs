use super::*;
use crate::layer::qemu_nbd::testing::{Random, qemu_img};
use crate::qcow2::testing::{VARIANTS, Variant, make, qemu, qemu_io};

/// Reads everything of a file that is damaged, or not: every call must return.
fn read_all(bytes: Vec<u8>) -> Result<Vec<u8>, ReadError> {
    /// What a sample has, at most: what a damaged header says is read no further.
    const MOST: u64 = 4 << 20;
    let length = bytes.len() as u64;
    let layer = LayerReader::from_source(Path::new("sample"), bytes, length)?;
    let size = layer.virtual_size().min(MOST);
    let mut end = 0;
    for piece in layer.map(0..size)? {
        let (range, _) = piece?;
        assert!(range.start == end && range.end > end && range.end <= size);
        end = range.end;
    }
    assert_eq!(end, size);
    let mut buf = vec![0; index(size)];
    layer.read_at(0, &mut buf)?;
    // The other end, where a damaged header promises more.
    let rest = layer.virtual_size() - layer.virtual_size().min(65536);
    layer.read_at(rest, &mut vec![0; index(layer.virtual_size() - rest)])?;
    Ok(buf)
}

/// A small file of each kind, with the offset behind its last table.
fn samples() -> Vec<(Variant, Vec<u8>)> {
    let Some(tools) = qemu() else {
        return Vec::new();
    };
    let directory = tempfile::tempdir().expect("a directory");
    let small = VARIANTS.into_iter().filter(|variant| variant.cluster <= 65536);
    small
        .enumerate()
        .map(|(index, variant)| {
            let name = index.to_string();
            let mut random = Random::new(77 + index as u64);
            make(&tools, directory.path(), &name, None, variant, (1 << 20) + 512, &mut random);
            (variant, std::fs::read(directory.path().join(&name)).expect("readable"))
        })
        .collect()
}

#[test]
fn subclusters_are_told_apart() {
    let Some(tools) = qemu() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let options = ["-o", "extended_l2=on,cluster_size=64k", "a", "1M"];
    qemu_img(&tools, directory.path(), &[&["create", "-q", "-f", "qcow2"][..], &options].concat());
    // Subclusters have 2 KiB.
    let commands = ["write -q -P 3 4096 4096", "write -q -z 8192 2048", "write -q -c -P 5 65536 64k"];
    qemu_io(directory.path(), "a", &commands.map(str::to_owned));
    let layer = LayerReader::open(&directory.path().join("a")).expect("valid");
    let pieces: Vec<_> = layer.map(0..1 << 20).expect("in range").map(Result::unwrap).collect();
    let expected = [
        (0..4096, Piece::Absent),
        (4096..8192, Piece::Data),
        (8192..10240, Piece::Zero),
        (10240..65536, Piece::Absent),
        (65536..131_072, Piece::Compressed),
        (131_072..1 << 20, Piece::Absent),
    ];
    assert_eq!(pieces, expected);
    let mut buf = [9; 12000];
    assert_eq!(layer.read_at(1, &mut buf).expect("readable"), [1..4096, 10240..12001]);
    assert!(buf[..4095].iter().chain(&buf[10239..]).all(|byte| *byte == 9), "left as it was");
    assert!(buf[4095..8191].iter().all(|byte| *byte == 3));
    assert!(buf[8191..10239].iter().all(|byte| *byte == 0));
}

/// Where the header, the L1 table and the L2 tables lie, as far as they may tell anything.
fn tables(bytes: &[u8]) -> Vec<Range<usize>> {
    let header = Header::parse(bytes, bytes.len() as u64).expect("valid");
    let number = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().expect("in the file"));
    let l1 = index(header.l1_table.offset)..index(header.l1_table.offset + header.l1_table.entries * 8);
    let mut found = vec![0..112, l1.clone()];
    for entry in l1.step_by(8) {
        let table = index(number(entry) & 0x00ff_ffff_ffff_fe00);
        if table != 0 {
            found.push(table..table + index(header.cluster_bits.size().min(1024)));
        }
    }
    found
}

#[test]
fn truncated_files_yield_an_error_or_what_they_still_hold() {
    for (variant, bytes) in samples() {
        assert!(read_all(bytes.clone()).is_ok(), "{variant:?}");
        let mut cuts: Vec<usize> = (0..bytes.len()).step_by(index(variant.cluster)).collect();
        for table in tables(&bytes) {
            cuts.extend([table.start, table.start + 1, table.end - 1]);
        }
        for cut in cuts {
            let result = read_all(bytes[..cut].to_vec());
            // Tables and the start of every cluster must be there. Behind the last one that is used
            // may be clusters that are not.
            if tables(&bytes).iter().any(|table| cut < table.end) {
                assert!(result.is_err(), "{variant:?} cut at {cut}");
            }
        }
    }
}

#[test]
fn changed_bits_yield_an_error_or_a_result() {
    for (variant, bytes) in samples() {
        let mut random = Random::new(variant.cluster);
        for table in tables(&bytes) {
            // As many as the time allows, other ones for each kind of file.
            for _ in 0..150 {
                let mut changed = bytes.clone();
                let at = table.start + index(random.below(table.len() as u64));
                changed[at] ^= 1 << random.below(8);
                let _ = read_all(changed);
            }
        }
    }
}

#[test]
fn errors_name_the_place() {
    let Some((_, bytes)) = samples().into_iter().find(|(variant, _)| variant.cluster == 65536) else {
        return;
    };
    let [_, l1, l2] = &tables(&bytes)[..] else { panic!("one L2 table") };
    let mut changed = bytes.clone();
    changed[l1.start] |= 0x40;
    let error = read_all(changed).expect_err("reserved");
    assert_eq!(error.to_string(), "the layer sample is damaged: entry 0 of its L1 table (guest offset 0x0)");
    let mut changed = bytes.clone();
    changed[l2.start + 3 * 8..][..8].copy_from_slice(&0x0077_0000_0000_0000_u64.to_be_bytes());
    let error = read_all(changed).expect_err("outside");
    let expected = format!(
        "the layer sample is damaged: entry 3 of the L2 table at {:#x} (guest offset 0x30000)",
        l2.start
    );
    assert_eq!(error.to_string(), expected);
    let ReadError::L2Entry { fault, .. } = error else { panic!("another error") };
    let expected = format!("it points to 0x77000000000000 of the file, which ends at {:#x}", bytes.len());
    assert_eq!(fault.to_string(), expected);
}

#[test]
fn files_that_are_no_layers_are_refused_by_name() {
    let Some((_, bytes)) = samples().into_iter().find(|(variant, _)| variant.options.contains("1.1")) else {
        return;
    };
    // Offset and value of one byte of the header, and a word of the reason.
    let cases = [
        (35, 1, "encrypted"),
        (79, 1, "dirty"),
        (79, 2, "corrupt"),
        (79, 4, "another file"),
        (79, 32, "unknown incompatible features 0x20"),
        (63, 1, "internal snapshots"),
        (7, 4, "version 4"),
    ];
    for (offset, value, word) in cases {
        let mut changed = bytes.clone();
        changed[offset] = value;
        let Err(ReadError::Header { cause, .. }) = read_all(changed) else { panic!("{word}") };
        assert!(cause.to_string().contains(word), "{cause}");
    }
}

#[test]
fn a_file_that_shrinks_is_an_error_not_zeroes() {
    let Some(tools) = qemu() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    qemu_img(&tools, directory.path(), &["create", "-q", "-f", "qcow2", "a", "1M"]);
    qemu_io(directory.path(), "a", &["write -q 0 1M".to_owned()]);
    let path = directory.path().join("a");
    let layer = LayerReader::open(&path).expect("valid");
    layer.read_at(0, &mut [0; 512]).expect("readable");
    File::options().write(true).open(&path).and_then(|file| file.set_len(400_000)).expect("shrunk");
    let error = layer.read_at(0, &mut vec![0; 1 << 20]).expect_err("cut off");
    assert!(matches!(error, ReadError::Shrunk { host: HostOffset(400_000), .. }), "{error}");
}

#[test]
fn a_layer_can_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<LayerReader>();
    shared::<Pieces<'_>>();
}
