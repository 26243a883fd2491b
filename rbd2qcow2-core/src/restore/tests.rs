#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::chain::lock::ChainLock;
use crate::chain::{Catalogue, ChainError, ChainWriter, Problem};
use crate::error::Causes;
use crate::layer::native::testing::{Form, cases, form, image as image_steps};
use crate::layer::qemu_nbd::testing::{Random, contents, qemu_img, qemus};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::check::check;
use crate::qcow2::layer::LayerReader;
use crate::qcow2::testing::{VARIANTS, make, qemu};

use crate::testing::Fixture;

mod faults;

impl Fixture {
    pub(super) fn restore(&self, point: Option<PointName>) -> Restore {
        Restore {
            dest: self.dest.path().to_owned(),
            image: self.image.as_str().to_owned(),
            point,
            options: RestoreOptions { parallel: 3, ..RestoreOptions::default() },
        }
    }

    fn to_file(&self, point: Option<PointName>, format: &FileFormat) -> Result<RestoreReport, RestoreError> {
        self.restore(point).to_file(&self.out.path().join("out"), format, &(), &Cancel::new())
    }

    /// Restores, and takes the file.
    fn file(&self, point: Option<PointName>, format: &FileFormat) -> (RestoreReport, PathBuf) {
        let report = self.to_file(point, format).expect("restored");
        let path = self.out.path().join("out");
        assert_eq!(names_in(self.out.path()), ["out"]);
        (report, path)
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("listed");
    entries.map(|entry| entry.expect("listed").file_name().into_string().expect("UTF-8")).collect()
}

fn format_of(form: &Form) -> FileFormat {
    FileFormat::Qcow2(Qcow2Options {
        compression: form.compression,
        cluster_size: 1 << form.cluster_bits,
        extended_l2: form.extended_l2,
    })
}

fn padded(content: &[u8]) -> Vec<u8> {
    let mut padded = content.to_vec();
    padded.resize(content.len().next_multiple_of(512), 0);
    padded
}

/// The file is one sound layer, and holds `content`.
fn check_qcow2(path: &Path, content: &[u8]) {
    let layer = LayerReader::open(path).expect("a layer");
    assert!(check(&layer, &Cancel::new(), &mut |_| {}).expect("checked").is_clean());
    let chain = ChainReader::from_layers(vec![layer]).expect("without a backing file");
    assert_eq!(chain.virtual_size(), content.len().next_multiple_of(512) as u64);
    let mut found = vec![0xee; content.len().next_multiple_of(512)];
    chain.read_at(0, &mut found).expect("readable");
    assert!(found == padded(content));
}

proptest! {
    #![proptest_config(cases(48))]
    #[test]
    fn what_was_backed_up_comes_back(
        steps in prop::collection::vec((form(), image_steps()), 1..6), which: Index, to in form()
    ) {
        let fixture = Fixture::new(&steps);
        let (point, content) = which.get(&fixture.points);
        let (report, path) = fixture.file(Some(*point), &FileFormat::Raw);
        prop_assert!(fs::read(&path).unwrap() == *content);
        prop_assert_eq!((report.image.as_str(), report.point), ("vm/1", *point));
        prop_assert_eq!(report.virtual_size, content.len() as u64);
        prop_assert_eq!(report.bytes_written + report.zero_bytes, content.len() as u64);
        let nonzero = content.chunks(4096).filter(|grain| grain.iter().any(|byte| *byte != 0));
        prop_assert_eq!(report.bytes_written, nonzero.map(|grain| grain.len() as u64).sum::<u64>());
        fs::remove_file(&path).unwrap();

        let (report, path) = fixture.file(Some(*point), &format_of(&to));
        check_qcow2(&path, content);
        prop_assert_eq!(report.bytes_written + report.zero_bytes, content.len() as u64);

        let mut stream = Vec::new();
        let report = fixture.restore(Some(*point)).to_stream(&mut stream, &(), &Cancel::new()).unwrap();
        prop_assert!(stream == *content);
        prop_assert_eq!((report.bytes_written, report.zero_bytes), (content.len() as u64, 0));
    }
}

proptest! {
    #![proptest_config(cases(6))]
    /// Stock QEMU finds nothing wrong with a restored file, and nothing that differs from the point.
    #[test]
    fn qemu_reads_what_was_restored(
        steps in prop::collection::vec((form(), image_steps()), 1..5), to in form()
    ) {
        let fixture = Fixture::new(&steps);
        let (_, content) = fixture.points.last().unwrap();
        fixture.file(None, &format_of(&to));
        let layer = fixture.layer(fixture.points.len() - 1);
        for tools in qemus() {
            let run = |arguments: &[&str]| qemu_img(&tools, fixture.out.path(), arguments);
            run(&["check", "-q", "-f", "qcow2", "out"]);
            let layer = layer.to_str().unwrap();
            run(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", "out", layer]);
            let info: serde_json::Value =
                serde_json::from_str(&run(&["info", "-f", "qcow2", "--output=json", "out"])).unwrap();
            prop_assert_eq!(&info["backing-filename"], &serde_json::Value::Null);
            prop_assert_eq!(info["virtual-size"].as_u64(), Some(content.len().next_multiple_of(512) as u64));
        }
    }
}

/// Chains of every kind of file that QEMU makes, as the Python tool lays them out.
#[test]
fn chains_of_the_python_tool_and_of_qemu_come_back() {
    let Some(tools) = qemu() else { return };
    let mut random = Random::new(0x5eed);
    for newest in VARIANTS {
        let fixture = Fixture::empty("vm");
        let directory = fixture.directory();
        fs::create_dir(&directory).expect("created");
        qemu_img(&tools, &directory, &["create", "-q", "-f", "qcow2", "empty.qcow2", "1M"]);
        let mut backing = "empty.qcow2".to_owned();
        let count = 1 + random.below(4);
        for number in 0..count {
            let any = VARIANTS[random.below(VARIANTS.len() as u64) as usize];
            let variant = if number == count - 1 { newest } else { any };
            let size = (1 + random.below(3 * 4096)) * 512;
            let name = format!("vm@{}.qcow2", 1_700_000_000 + number);
            make(&tools, &directory, &name, Some(&backing), variant, size, &mut random);
            backing = name;
        }
        let expected = contents(&tools, &directory, &backing);
        let (report, path) = fixture.file(None, &FileFormat::Raw);
        assert!(fs::read(&path).expect("readable") == expected, "{newest:?}");
        assert_eq!(report.point.to_string(), format!("{}", 1_700_000_000 + count - 1));
        fs::remove_file(&path).expect("removed");
        let options = Qcow2Options { compression: Compression::Zlib, ..Qcow2Options::default() };
        let (_, path) = fixture.file(None, &FileFormat::Qcow2(options));
        check_qcow2(&path, &expected);
    }
}

#[test]
fn the_newest_point_is_restored_where_none_is_named() {
    let fixture = Fixture::of_sizes(&[1 << 20, 0, 1_000_001]);
    let (report, path) = fixture.file(None, &FileFormat::default());
    assert_eq!(report.point, fixture.points[2].0);
    assert!(fs::read(&path).expect("readable") == fixture.points[2].1);
    fs::remove_file(path).expect("removed");
    let (report, path) = fixture.file(Some(fixture.points[1].0), &FileFormat::default());
    assert_eq!((report.virtual_size, report.bytes_written, report.zero_bytes), (0, 0, 0));
    assert_eq!(fs::metadata(path).expect("there").len(), 0);
}

/// Only the manifest knows the size to the byte; without it the point still comes back.
#[test]
fn a_point_without_its_manifest_comes_back_padded() {
    let fixture = Fixture::of_sizes(&[1_000_001]);
    fs::remove_file(fixture.layer(0).with_extension("json")).expect("removed");
    let (report, path) = fixture.file(None, &FileFormat::Raw);
    assert_eq!(report.virtual_size, 1_000_448);
    assert!(fs::read(path).expect("readable") == padded(&fixture.points[0].1));
}
