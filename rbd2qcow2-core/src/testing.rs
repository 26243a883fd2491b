//! An image with points, for tests of whatever reads or changes chains.

#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::path::PathBuf;

use crate::chain::manifest::tests::record;
use crate::chain::{ChainWriter, ImageName, LayerPlan, PointName, Record};
use crate::layer::native::testing::{Form, Step, next_content, spec_of, write_with};
use crate::layer::{Compression, ExtendedL2, LayerWriter};

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
        let mut fixture = Self::empty("vm");
        for (number, size) in (1..).zip(sizes) {
            let mut content = vec![0; *size];
            for (index, byte) in content.iter_mut().enumerate().skip(number << 16).take(3 << 16) {
                *byte = index as u8 ^ number as u8;
            }
            fixture.back_up(&plain(), content);
        }
        fixture
    }

    /// Points of which the first is large, and the others hold little: some data, parts of clusters, and
    /// zeroes.
    pub(crate) fn of_small_changes(count: usize) -> Self {
        let mut fixture = Self::empty("vm");
        let mut content: Vec<u8> = (0..600_000_u32).map(|index| (index / 3) as u8 | 1).collect();
        for number in 0..count {
            let start = 70_000 * number;
            content[start + 1000..start + 9000].fill(number as u8 | 0x80);
            content[start + 20_000..start + 40_000].fill(0);
            fixture.back_up(&plain(), content.clone());
        }
        fixture
    }

    pub(crate) fn back_up(&mut self, form: &Form, content: Vec<u8>) {
        let writer = ChainWriter::open(self.dest.path(), &self.image).expect("opened");
        let time = jiff::Timestamp::from_second(1_700_000_000 + self.points.len() as i64).expect("a time");
        let point = PointName::at(time).expect("a name");
        let cluster_size = 1 << form.cluster_bits;
        let parent = writer.catalogue().newest();
        let pending = writer.begin(LayerPlan { point, parent, cluster_size }).expect("begun");
        let mut spec = spec_of(self.dest.path(), "layer", content.len(), pending.backing_name(), form);
        spec.path = pending.layer_path().to_owned();
        let base = self.points.last().map(|(_, content)| content.as_slice());
        let layer = write_with(&spec, &content, base, form.block, pending.digests());
        let extended_l2 = layer.grain() < u64::from(cluster_size);
        let record = Record {
            cluster_size,
            extended_l2,
            compression: form.compression.to_string(),
            ..record(content.len() as u64, point)
        };
        pending.commit(record).expect("committed");
        self.points.push((point, content));
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
