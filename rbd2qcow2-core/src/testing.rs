//! An image with points, for tests of whatever reads or changes chains.

#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::fs;
use std::path::{Path, PathBuf};

use crate::chain::catalogue::PYTHON_ROOT;
use crate::chain::digests::DigestWriter;
use crate::chain::manifest::tests::record;
use crate::chain::{Catalogue, ChainWriter, ImageName, LayerPlan, PointName, Record};
use crate::layer::native::testing::{
    Form, Step, empty, fill_layer, next_content, spec_of, write, write_with,
};
use crate::layer::qemu_nbd::testing::{Random, contents};
use crate::layer::qemu_nbd::{QemuNbdLayer, QemuNbdOptions, QemuTools};
use crate::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter};
use crate::qcow2::testing::{Variant, make};

/// A destination with one image, and a directory to restore to.
pub(crate) struct Fixture {
    pub(crate) dest: tempfile::TempDir,
    pub(crate) out: tempfile::TempDir,
    pub(crate) image: ImageName,
    /// What each point holds, the oldest first.
    pub(crate) points: Vec<(PointName, Vec<u8>)>,
}

impl Fixture {
    pub(crate) fn empty(image: &str) -> Self {
        let directory = || tempfile::tempdir().expect("a directory");
        let image = ImageName::new(image).expect("a name");
        Self { dest: directory(), out: directory(), image, points: Vec::new() }
    }

    /// An image with a point for each step.
    pub(crate) fn new(steps: &[Step]) -> Self {
        let mut fixture = Self::empty("vm/1");
        for (form, image) in steps {
            let old = fixture.points.last().map_or(&[][..], |(_, content)| content);
            fixture.back_up(form, next_content(old, image));
        }
        fixture
    }

    /// Points of so many bytes each, alike but for the part that changes.
    pub(crate) fn of_sizes(sizes: &[usize]) -> Self {
        Self::begun_by_python(0, sizes)
    }

    /// As [`of_sizes`](Self::of_sizes); the first `python` of them are the Python tool's.
    pub(crate) fn begun_by_python(python: usize, sizes: &[usize]) -> Self {
        let mut fixture = Self::empty("vm");
        for (number, size) in (1..).zip(sizes) {
            let mut content = vec![0; *size];
            for (index, byte) in content.iter_mut().enumerate().skip(number << 16).take(3 << 16) {
                *byte = index as u8 ^ number as u8;
            }
            if number <= python {
                let form = Form { extended_l2: ExtendedL2::Off, ..plain() };
                fixture.back_up_as_python(&form, content);
            } else {
                fixture.back_up(&plain(), content);
            }
        }
        fixture
    }

    /// Points of which the first is large, and the others hold little: some data, parts of clusters, and
    /// zeroes.
    pub(crate) fn of_small_changes(count: usize) -> Self {
        Self::empty("vm").with_small_changes(count, &plain())
    }

    /// Adds such points, of any form.
    pub(crate) fn with_small_changes(mut self, count: usize, form: &Form) -> Self {
        let mut content: Vec<u8> = (0..600_000_u32).map(|index| (index / 3) as u8 | 1).collect();
        for number in 0..count {
            let start = 70_000 * number;
            content[start + 1000..start + 9000].fill(number as u8 | 0x80);
            content[start + 20_000..start + 40_000].fill(0);
            self.back_up(form, content.clone());
        }
        self
    }

    /// Makes a point as this program does.
    pub(crate) fn back_up(&mut self, form: &Form, content: Vec<u8>) {
        self.back_up_upon(self.points.len().checked_sub(1), form, content);
    }

    /// Makes a point that builds upon the one of this number: several may build upon one.
    pub(crate) fn back_up_upon(&mut self, parent: Option<usize>, form: &Form, content: Vec<u8>) {
        self.back_up_with(parent, form, content, "native", |spec, content, base, digests| {
            write_with(spec, content, base, form.block, digests).grain() < u64::from(spec.cluster_size)
        });
    }

    /// Makes a point as this program does when QEMU writes the layers.
    pub(crate) fn back_up_by_qemu(&mut self, tools: &QemuTools, form: &Form, content: Vec<u8>) {
        let parent = self.points.len().checked_sub(1);
        self.back_up_with(parent, form, content, "qemu-nbd", |spec, content, base, digests| {
            let options = QemuNbdOptions { tools: tools.clone(), ..QemuNbdOptions::default() };
            let layer = QemuNbdLayer::create(spec, options).expect("created");
            fill_layer(&layer, content, base, form.block, digests);
            layer.grain() < u64::from(spec.cluster_size)
        });
    }

    /// `write` makes the layer, and tells whether it has extended L2 entries.
    fn back_up_with(
        &mut self,
        parent: Option<usize>,
        form: &Form,
        content: Vec<u8>,
        made_by: &str,
        write: impl FnOnce(&LayerSpec, &[u8], Option<&[u8]>, &DigestWriter) -> bool,
    ) {
        let writer = ChainWriter::open(self.dest.path(), &self.image).expect("opened");
        let time = jiff::Timestamp::from_second(self.next_second()).expect("a time");
        let point = PointName::at(time).expect("a name");
        let cluster_size = 1 << form.cluster_bits;
        let parent = parent.map(|index| &self.points[index]);
        let base = parent.map(|(_, content)| content.as_slice());
        let parent = parent.map(|(name, _)| writer.catalogue().point(*name).expect("there"));
        let pending = writer.begin(LayerPlan { point, parent, cluster_size }).expect("begun");
        let mut spec = spec_of(self.dest.path(), "layer", content.len(), pending.backing_name(), form);
        spec.path = pending.layer_path().to_owned();
        let extended_l2 = write(&spec, &content, base, pending.digests());
        let record = Record {
            cluster_size,
            extended_l2,
            writer: made_by.to_owned(),
            compression: form.compression.to_string(),
            ..record(content.len() as u64, point)
        };
        pending.commit(record).expect("committed");
        self.points.push((point, content));
    }

    /// Makes a point in the Python tool's layout: no manifest, no digests, and the first layer builds upon an
    /// image of nothing.
    pub(crate) fn back_up_as_python(&mut self, form: &Form, content: Vec<u8>) {
        let base = self.points.last().map(|(_, content)| content.clone());
        self.add_python(|directory, name, backing| {
            let spec = spec_of(directory, name, content.len(), Some(backing), form);
            write(&spec, &content, base.as_deref(), form.block);
            content
        });
    }

    /// Makes a point in the Python tool's layout with stock QEMU: a file of any kind, of `sectors`, with
    /// random changes.
    pub(crate) fn back_up_by_python(
        &mut self,
        tools: &QemuTools,
        variant: Variant,
        sectors: u64,
        random: &mut Random,
    ) {
        self.add_python(|directory, name, backing| {
            make(tools, directory, name, Some(&backing), variant, sectors * 512, random);
            contents(tools, directory, name)
        });
    }

    /// `write` makes the layer, of that name, in that directory, upon that file; and tells what it holds.
    fn add_python(&mut self, write: impl FnOnce(&Path, &str, String) -> Vec<u8>) {
        let directory = self.directory();
        fs::create_dir_all(&directory).expect("created");
        let root = directory.join(PYTHON_ROOT);
        if !root.exists() {
            fs::rename(empty(&directory, 1 << 20), root).expect("renamed");
        }
        let name = |point| format!("{}@{point}.qcow2", self.image.encoded());
        let catalogue = Catalogue::read(&directory, &self.image).expect("read");
        let backing = catalogue.newest().map_or(PYTHON_ROOT.to_owned(), |newest| name(newest.name));
        let point = PointName::parse(&self.next_second().to_string()).expect("a name");
        let content = write(&directory, &name(point), backing);
        self.points.push((point, content));
    }

    /// When the next point is made, as unix time.
    fn next_second(&self) -> i64 {
        1_700_000_000 + self.points.len() as i64
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.dest.path().join(self.image.encoded())
    }

    pub(crate) fn layer(&self, index: usize) -> PathBuf {
        self.directory().join(format!("{}@{}.qcow2", self.image.encoded(), self.points[index].0))
    }
}

/// Layers as they are without options.
pub(crate) fn plain() -> Form {
    Form { cluster_bits: 16, extended_l2: ExtendedL2::Auto, compression: Compression::None, block: 4096 }
}
