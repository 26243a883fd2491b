use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::*;
use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{Random, qemu_img};
use crate::qcow2::header::Header;
use crate::qcow2::refcount::{RefcountWidth, put};
use crate::qcow2::testing::{VARIANTS, Variant, make, qemu, qemu_io};

mod damage;
mod hostile;

/// Bit 63 of an entry.
const COPIED: u64 = 1 << 63;

/// What `qemu-img check` says of a file.
#[derive(Debug)]
struct Verdict {
    corruptions: u64,
    leaks: u64,
    /// What kept it from checking everything.
    check_errors: u64,
    /// Clusters of the guest's image with a place, compressed ones too.
    allocated: u64,
    compressed: u64,
    end: Option<u64>,
}

impl Verdict {
    fn errors(&self) -> u64 {
        self.corruptions + self.check_errors
    }
}

/// Asks `qemu-img check` of the file at `path`; `None` when it does not open it.
fn verdict(tools: &QemuTools, path: &Path) -> Option<Verdict> {
    let mut command = Command::new(tools.qemu_img());
    command.args(["check", "-f", "qcow2", "--output=json"]).arg(path);
    let output = command.output().expect("qemu-img runs");
    assert!(output.status.code().is_some(), "qemu-img was killed: {}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).ok()?;
    let number = |name: &str| report[name].as_u64();
    Some(Verdict {
        corruptions: number("corruptions").unwrap_or(0),
        leaks: number("leaks").unwrap_or(0),
        check_errors: number("check-errors")?,
        allocated: number("allocated-clusters").unwrap_or(0),
        compressed: number("compressed-clusters").unwrap_or(0),
        end: number("image-end-offset"),
    })
}

fn checked(path: &Path) -> Result<Structure, CheckError> {
    let layer = LayerReader::open(path)?;
    check(&layer, &Cancel::new(), &mut |_| ())
}

/// A file that QEMU made, to be damaged in place.
struct Sample {
    _directory: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
    header: Header,
}

impl Sample {
    fn new(directory: tempfile::TempDir, name: &str) -> Self {
        let path = directory.path().join(name);
        let bytes = std::fs::read(&path).expect("readable");
        let header = Header::parse(&bytes, bytes.len() as u64).expect("valid");
        Self { _directory: directory, path, bytes, header }
    }

    /// A file with two L2 tables and clusters of every kind. Guest clusters 0 to 3 are data, 5 and 6
    /// compressed, 8 is zero (absent in version 2), all others of the first table are absent; the first one of the second table
    /// is data.
    fn with_everything(tools: &QemuTools, variant: Variant) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let cluster = variant.cluster;
        let second = coverage(variant);
        let options = format!("{},cluster_size={cluster}", variant.options);
        let size = (second * 2).to_string();
        qemu_img(tools, directory.path(), &["create", "-q", "-f", "qcow2", "-o", &options, "sample", &size]);
        let commands = [
            format!("write -q -P 1 0 {}", 4 * cluster),
            format!("write -q -c -P 2 {} {cluster}", 5 * cluster),
            format!("write -q -c -P 3 {} {cluster}", 6 * cluster),
            format!("write -q -z {} {cluster}", 8 * cluster),
            format!("write -q -P 4 {second} {cluster}"),
        ];
        qemu_io(directory.path(), "sample", &commands);
        Self::new(directory, "sample")
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_bits.size()
    }

    fn number(&self, host: u64) -> u64 {
        let at = usize::try_from(host).expect("in memory");
        u64::from_be_bytes(*self.bytes[at..].first_chunk().expect("in the file"))
    }

    /// Where the entry `index` of the L1 table stands.
    fn l1_at(&self, index: u64) -> u64 {
        self.header.l1_table.offset + index * 8
    }

    /// Where the L2 table `index` lies.
    fn l2(&self, index: u64) -> u64 {
        self.number(self.l1_at(index)) & !COPIED
    }

    /// Where the entry `index` of the L2 table `table` stands.
    fn l2_at(&self, table: u64, index: u64) -> u64 {
        self.l2(table) + index * if self.header.extended_l2 { 16 } else { 8 }
    }

    /// Where the data of an entry lie.
    fn data(&self, table: u64, index: u64) -> u64 {
        self.number(self.l2_at(table, index)) & !COPIED & !1
    }

    fn reftable_at(&self, index: u64) -> u64 {
        self.header.refcount_table.offset + index * 8
    }

    /// Where the first refcount block lies. It tells of the whole file.
    fn block(&self) -> u64 {
        self.number(self.reftable_at(0))
    }

    fn width(&self) -> RefcountWidth {
        RefcountWidth::of(&self.header)
    }

    /// The change that gives the clusters at these places of the file these refcounts. All must be in
    /// the first block.
    fn refcounts(&self, counts: &[(u64, u64)]) -> Change {
        let start = usize::try_from(self.block()).expect("in memory");
        let mut bytes = self.bytes[start..][..usize::try_from(self.cluster()).expect("small")].to_vec();
        for (host, count) in counts {
            let index = usize::try_from(host / self.cluster()).expect("small");
            assert!(put(&mut bytes, self.width(), index, *count));
        }
        (self.block(), bytes)
    }

    /// Runs `test` on the file with `changes`, then undoes them.
    fn changed<T>(&self, changes: &[Change], test: impl FnOnce(&Path) -> T) -> T {
        let file = File::options().write(true).open(&self.path).expect("writable");
        for (at, bytes) in changes {
            file.write_all_at(bytes, *at).expect("written");
        }
        let result = test(&self.path);
        file.set_len(self.bytes.len() as u64).expect("cut");
        for (at, bytes) in changes {
            let start = usize::try_from(*at).expect("in memory").min(self.bytes.len());
            let end = (start + bytes.len()).min(self.bytes.len());
            file.write_all_at(&self.bytes[start..end], *at).expect("written");
        }
        result
    }
}

/// Bytes to be written to a place of a file.
type Change = (u64, Vec<u8>);

fn number(at: u64, value: u64) -> Change {
    (at, value.to_be_bytes().to_vec())
}

/// How much of the image an L2 table tells of.
fn coverage(variant: Variant) -> u64 {
    let entry = if variant.options.contains("extended_l2=on") { 16 } else { 8 };
    variant.cluster / entry * variant.cluster
}

/// One kind of file for each width of refcounts, besides [`VARIANTS`].
fn every_width() -> impl Iterator<Item = Variant> {
    let widths = [1, 2, 4, 8, 16, 32, 64].map(|bits| match bits {
        1 => "compat=1.1,refcount_bits=1",
        2 => "compat=1.1,refcount_bits=2",
        4 => "compat=1.1,refcount_bits=4",
        8 => "compat=1.1,refcount_bits=8",
        16 => "compat=1.1,refcount_bits=16",
        32 => "compat=1.1,refcount_bits=32",
        _ => "compat=1.1,refcount_bits=64",
    });
    widths.into_iter().map(|options| Variant { cluster: 4096, options })
}

/// Writes to the image again and again: overwritten, discarded and zeroed places.
fn churn(directory: &Path, image: &str, size: u64, random: &mut Random) {
    let commands: Vec<String> = (0..60)
        .map(|_| {
            let verb = ["write -q -P 9", "discard -q", "write -q -z", "write -q -z -u"];
            let verb = verb[usize::try_from(random.below(4)).expect("small")];
            let offset = random.below(size / 512) * 512;
            let length = ((1 + random.below(300)) * 512).min(size - offset);
            format!("{verb} {offset} {length}")
        })
        .collect();
    qemu_io(directory, image, &commands);
}

/// Compares our verdict of a file that is well with that of QEMU, and what both count.
fn compare_clean(tools: &QemuTools, path: &Path, about: &str) -> Figures {
    let ours = checked(path).expect("readable");
    assert!(ours.is_clean(), "{about}: {ours:#?}");
    let theirs = verdict(tools, path).expect("opened");
    assert_eq!((theirs.errors(), theirs.leaks), (0, 0), "{about}");
    let figures = ours.figures;
    assert_eq!(figures.data + figures.compressed, theirs.allocated, "{about}");
    assert_eq!(figures.compressed, theirs.compressed, "{about}");
    assert_eq!(Some(figures.end), theirs.end, "{about}");
    figures
}

#[test]
fn what_qemu_wrote_is_clean() {
    let Some(tools) = qemu() else {
        return;
    };
    let mut sum = Figures::default();
    for (round, variant) in VARIANTS.into_iter().chain(every_width()).enumerate() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut random = Random::new(0xc1ea + round as u64);
        let mut below = None;
        for index in 0..3 {
            let name = format!("layer{index}");
            let size = (1 + random.below(3 * 4096)) * 512;
            make(&tools, directory.path(), &name, below.as_deref(), variant, size, &mut random);
            churn(directory.path(), &name, size, &mut random);
            let figures = compare_clean(&tools, &directory.path().join(&name), &format!("{variant:?}"));
            sum.data += figures.data;
            sum.compressed += figures.compressed;
            sum.zero += figures.zero;
            below = Some(name);
        }
    }
    // Otherwise the rounds would show little.
    assert!(sum.data > 1000 && sum.compressed > 50 && sum.zero > 100, "{sum:?}");
}

#[test]
fn an_empty_file_is_clean() {
    let Some(tools) = qemu() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    for (name, size) in [("small", "0"), ("large", "1T")] {
        qemu_img(&tools, directory.path(), &["create", "-q", "-f", "qcow2", name, size]);
        let figures = compare_clean(&tools, &directory.path().join(name), name);
        assert_eq!((figures.data, figures.compressed, figures.zero), (0, 0, 0));
        assert!(figures.tables >= 3);
    }
    let preallocated = ["-o", "preallocation=metadata", "full", "3M"];
    qemu_img(&tools, directory.path(), &[&["create", "-q", "-f", "qcow2"], &preallocated[..]].concat());
    assert_eq!(compare_clean(&tools, &directory.path().join("full"), "full").data, 48);
}

#[test]
fn clusters_are_told_apart() {
    let Some(tools) = qemu() else {
        return;
    };
    let sample = Sample::with_everything(&tools, Variant { cluster: 65536, options: "compat=1.1" });
    let figures = compare_clean(&tools, &sample.path, "all");
    // Header, refcount table and block, L1 table, two L2 tables.
    assert_eq!((figures.data, figures.compressed, figures.zero, figures.tables), (5, 2, 1, 6));
}

#[test]
fn bitmaps_are_refused() {
    let Some(tools) = qemu() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    qemu_img(&tools, directory.path(), &["create", "-q", "-f", "qcow2", "a", "1M"]);
    qemu_img(&tools, directory.path(), &["bitmap", "--add", "a", "changes"]);
    let found = checked(&directory.path().join("a")).expect("readable");
    assert_eq!((found.errors, found.error_count), (vec![Finding::Bitmaps], 1));
    assert!(found.leak_count > 0);
}
