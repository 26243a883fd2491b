#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::layer::native::testing::{Form, Stretch};
use crate::layer::native::testing::{cases, form, image, next_content, spec_of, write, write_chain};
use crate::layer::qemu_nbd::testing::qemus;
use crate::layer::{Compression, ExtendedL2};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::check::check;

mod power;

/// A file of which all changes fail from a certain one on.
struct Faulty {
    file: File,
    path: PathBuf,
    /// Changes so far.
    done: Cell<usize>,
    fails_at: usize,
    /// Half of the failing write is done.
    torn: bool,
}

impl Faulty {
    fn new(path: &Path, fails_at: usize) -> Self {
        let file = File::options().read(true).write(true).open(path).expect("opened");
        Self { file, path: path.to_owned(), done: Cell::new(0), fails_at, torn: true }
    }

    fn reader(&self) -> LayerReader {
        let file = self.file.try_clone().expect("cloned");
        let bytes = file.metadata().expect("there").len();
        LayerReader::from_source(&self.path, file, bytes).expect("readable")
    }

    fn step(&self) -> io::Result<()> {
        let number = self.done.replace(self.done.get() + 1);
        if number >= self.fails_at { Err(io::Error::other("injected failure")) } else { Ok(()) }
    }

    /// Puts `above` into the file.
    fn absorb(&self, above: &LayerReader) -> Result<(), AbsorbError> {
        let (below, progress, cancel) = (self.reader(), Amount::default(), Cancel::new());
        let mut absorb = Absorb::new(self, &below, above, &progress, &cancel)?;
        absorb.copy()?;
        assert_eq!(progress.done.get(), progress.total.get());
        absorb.switch()?;
        absorb.finish(&self.reader())
    }
}

impl Medium for Faulty {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let result = self.step();
        if result.is_err() && self.torn && self.done.get() == self.fails_at + 1 && bytes.len() > 8 {
            self.file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
        }
        result?;
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.step()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.step()?;
        // What is given back must be of no use to anybody.
        self.file.write_all_at(&vec![0xdd; (range.end - range.start) as usize], range.start)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.step()?;
        self.file.set_len(length)
    }
}

fn content(paths: &[PathBuf]) -> Vec<u8> {
    let chain = ChainReader::open(paths).expect("a chain");
    let mut found = vec![0xee; chain.virtual_size() as usize];
    chain.read_at(0, &mut found).expect("readable");
    found
}

/// `wanted` is the image's content; layers are rounded up to sectors.
fn assert_content(paths: &[PathBuf], wanted: &[u8], context: &str) {
    let mut wanted = wanted.to_vec();
    wanted.resize(wanted.len().next_multiple_of(512), 0);
    assert!(content(paths) == wanted, "{context}: the content has changed");
}

fn assert_clean(path: &Path, context: &str) {
    let layer = LayerReader::open(path).expect("readable");
    let found = check(&layer, &Cancel::new(), &mut |_| {}).expect("checked");
    assert!(found.is_clean(), "{context}: {found:?}");
}

/// Two layers of one form, the older one first, and what the image is with the newer.
fn pair(
    directory: &Path,
    form: &Form,
    images: [&(usize, Vec<(usize, Stretch)>); 2],
) -> (PathBuf, PathBuf, Vec<u8>) {
    let size = images[0].0;
    let mut old = Vec::new();
    let mut paths = Vec::new();
    for (number, (_, stretches)) in images.into_iter().enumerate() {
        let new = next_content(&old, &(size, stretches.clone()));
        let backing = (number == 1).then(|| "layer0".to_owned());
        let spec = spec_of(directory, &format!("layer{number}"), size, backing, form);
        write(&spec, &new, (number == 1).then_some(old.as_slice()), form.block);
        paths.push(spec.path);
        old = new;
    }
    let above = paths.pop().expect("two");
    (paths.pop().expect("two"), above, old)
}

proptest! {
    #![proptest_config(cases(48))]
    /// Wherever it is cut short, nothing is seen through the layer above; and the next one completes it.
    #[test]
    fn a_layer_takes_over_what_the_one_above_holds(
        form in form(), images in (image(), image()), cut in any::<prop::sample::Index>()
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (below, above, wanted) = pair(directory.path(), &form, [&images.0, &images.1]);
        let whole = directory.path().join("whole");
        fs::copy(&below, &whole).unwrap();
        let above_reader = LayerReader::open(&above).unwrap();
        let steps = {
            let medium = Faulty::new(&whole, usize::MAX);
            medium.absorb(&above_reader).unwrap();
            medium.done.get()
        };
        assert_content(std::slice::from_ref(&whole), &wanted, "whole");
        assert_clean(&whole, "whole");
        let cut = cut.index(steps);
        let context = format!("cut at {cut} of {steps}");
        Faulty::new(&below, cut).absorb(&above_reader).unwrap_err();
        assert_content(&[above.clone(), below.clone()], &wanted, &context);
        Faulty::new(&below, usize::MAX).absorb(&above_reader).unwrap();
        assert_content(&[above, below.clone()], &wanted, &context);
        assert_content(std::slice::from_ref(&below), &wanted, &context);
        assert_clean(&below, &context);
    }
}

fn plain(compression: Compression) -> Form {
    Form { cluster_bits: 16, extended_l2: ExtendedL2::Auto, compression, block: 4096 }
}

/// Each change of the file, cut short before it and in the middle of it.
#[test]
fn it_can_be_cut_short_at_every_change() {
    for compression in [Compression::None, Compression::Zstd { level: None }] {
        let directory = tempfile::tempdir().expect("a directory");
        let old = vec![(300_000, Stretch::Text(3)), (200_000, Stretch::Noise(5)), (100_000, Stretch::Zeroes)];
        let new = vec![
            (50_000, Stretch::Old),
            (9_000, Stretch::Noise(7)),
            (70_000, Stretch::Zeroes),
            (60_000, Stretch::Old),
            (150_000, Stretch::Text(9)),
        ];
        let form = plain(compression);
        let (below, above, wanted) = pair(directory.path(), &form, [&(1 << 20, old), &(1 << 20, new)]);
        let above_reader = LayerReader::open(&above).expect("readable");
        let before = fs::read(&below).expect("read");
        let again = directory.path().join("again");
        let mut done = false;
        for cut in 0.. {
            fs::write(&below, &before).expect("written");
            let context = format!("{compression}, cut at {cut}");
            done = Faulty::new(&below, cut).absorb(&above_reader).is_ok();
            assert_content(&[above.clone(), below.clone()], &wanted, &context);
            if done {
                break;
            }
            // The next one may be cut short, too.
            fs::copy(&below, &again).expect("copied");
            Faulty::new(&below, cut / 2).absorb(&above_reader).expect_err("cut short");
            assert_content(&[above.clone(), below.clone()], &wanted, &context);
            for path in [&below, &again] {
                Faulty::new(path, usize::MAX).absorb(&above_reader).expect("completed");
                assert_content(std::slice::from_ref(path), &wanted, &context);
                assert_clean(path, &context);
            }
        }
        assert!(done);
    }
}

#[test]
fn stock_qemu_finds_nothing_wrong() {
    for tools in qemus() {
        for compression in [Compression::None, Compression::Zlib, Compression::Zstd { level: None }] {
            let directory = tempfile::tempdir().expect("a directory");
            let old = vec![(700_000, Stretch::Text(3)), (300_000, Stretch::Noise(5))];
            let new = vec![(90_000, Stretch::Old), (9_000, Stretch::Noise(7)), (140_000, Stretch::Zeroes)];
            let (below, above, mut wanted) =
                pair(directory.path(), &plain(compression), [&(1_000_001, old), &(1_000_001, new)]);
            let above = LayerReader::open(&above).expect("readable");
            Faulty::new(&below, usize::MAX).absorb(&above).expect("absorbed");
            wanted.resize(wanted.len().next_multiple_of(512), 0);
            let found = crate::layer::qemu_nbd::testing::contents(&tools, directory.path(), "layer0");
            assert!(found == wanted, "{compression}");
        }
    }
}

/// Room that is given back is used again: the file does not grow for ever.
#[test]
fn a_file_that_takes_over_again_and_again_does_not_grow() {
    for compression in [Compression::None, Compression::Zstd { level: None }] {
        let directory = tempfile::tempdir().expect("a directory");
        let (size, form) = (1 << 20, plain(compression));
        let stretches = |seed| {
            vec![(100_000, Stretch::Text(seed)), (60_000, Stretch::Noise(seed)), (1000, Stretch::Zeroes)]
        };
        let (below, above, mut old) =
            pair(directory.path(), &form, [&(size, stretches(1)), &(size, stretches(2))]);
        let mut lengths = Vec::new();
        for seed in 3..30 {
            Faulty::new(&below, usize::MAX)
                .absorb(&LayerReader::open(&above).expect("readable"))
                .expect("absorbed");
            assert_content(std::slice::from_ref(&below), &old, "again");
            lengths.push(fs::metadata(&below).expect("there").size());
            fs::remove_file(&above).expect("removed");
            let new = next_content(&old, &(size, stretches(seed)));
            let spec = spec_of(directory.path(), "layer1", size, Some("layer0".to_owned()), &form);
            write(&spec, &new, Some(&old), form.block);
            old = new;
        }
        let (first, last) = (lengths[2], *lengths.last().expect("some"));
        assert!(last <= first * 2, "{lengths:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_untouched() {
    let directory = tempfile::tempdir().expect("a directory");
    let images = [(1 << 20, vec![(9000, Stretch::Noise(3))]), (1 << 20, vec![(70_000, Stretch::Noise(4))])];
    let forms = [plain(Compression::None), Form { cluster_bits: 17, ..plain(Compression::None) }];
    let steps: Vec<_> = forms.into_iter().zip(images).collect();
    let points = write_chain(directory.path(), &steps);
    let (above, below) = (LayerReader::open(&points[0].0).expect("readable"), &points[1].0);
    let before = fs::read(below).expect("read");
    let error = Faulty::new(below, usize::MAX).absorb(&above).expect_err("another form");
    assert!(matches!(error, AbsorbError::Unfit { .. }), "{error}");
    assert!(fs::read(below).expect("read") == before);
}

/// Overwriting a cluster that two entries lead to would change what the other one shows.
#[test]
fn a_file_that_uses_a_cluster_twice_is_not_changed() {
    let directory = tempfile::tempdir().expect("a directory");
    let images =
        [&(1 << 20, vec![(300_000, Stretch::Noise(3))]), &(1 << 20, vec![(9_000, Stretch::Noise(4))])];
    let (below, above, _) = pair(directory.path(), &plain(Compression::None), images);
    let reader = LayerReader::open(&below).expect("readable");
    let mut raw = [0; 8];
    reader.read_exact(HostOffset(reader.header().l1_table.offset), &mut raw).expect("read");
    let table = u64::from_be_bytes(raw) & super::super::table::OFFSET_MASK;
    let file = File::options().read(true).write(true).open(&below).expect("opened");
    let mut entry = [0; 16];
    file.read_exact_at(&mut entry, table).expect("read");
    file.write_all_at(&entry, table + 16).expect("written");
    let before = fs::read(&below).expect("read");
    let above = LayerReader::open(&above).expect("readable");
    let error = Faulty::new(&below, usize::MAX).absorb(&above).expect_err("used twice");
    assert!(matches!(error, AbsorbError::UsedTwice { .. }), "{error}");
    assert!(fs::read(&below).expect("read") == before);
}
