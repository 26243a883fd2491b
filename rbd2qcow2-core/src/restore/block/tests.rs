#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::buffer::Buffer;
use crate::compare::GRAIN;
use crate::extent::{Extent, ExtentKind, is_zero};
use crate::layer::native::testing::{Stretch, cases, form, image as image_steps};
use crate::source::SourceError;
use crate::source::memory::MemorySource;
use crate::testing::Fixture;

/// A block image in memory, with faults on demand.
#[derive(Default)]
struct MemoryBlock {
    content: Mutex<Vec<u8>>,
    changes: Mutex<Vec<(Range<usize>, ExtentKind)>>,
    /// Bytes that are reported together when they are not zero.
    block: usize,
    /// A change that touches this byte fails.
    fail_change: Option<u64>,
    fail_read: Option<u64>,
    fail_flush: bool,
    flushes: Mutex<usize>,
    /// Is set by the first change.
    cancel: Option<Cancel>,
}

impl MemoryBlock {
    fn new(content: Vec<u8>) -> Self {
        Self { content: Mutex::new(content), block: 1, ..Self::default() }
    }

    fn size(&self) -> u64 {
        self.content.lock().unwrap().len() as u64
    }

    fn change(
        &self,
        range: &Range<u64>,
        kind: ExtentKind,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), BoxError> {
        if self.fail_change.is_some_and(|at| range.contains(&at)) {
            return Err("a fault on demand".into());
        }
        if let Some(cancel) = &self.cancel {
            cancel.set();
        }
        let range = range.start as usize..range.end as usize;
        fill(&mut self.content.lock().unwrap()[range.clone()]);
        self.changes.lock().unwrap().push((range, kind));
        Ok(())
    }

    fn snapshot(&self) -> MemorySource {
        MemorySource {
            content: self.content.lock().unwrap().clone(),
            block: self.block,
            fail_read: self.fail_read,
            ..MemorySource::default()
        }
    }

    fn target(&self, contents: bool, object_size: Option<u64>) -> BlockTarget<'_> {
        let contents = contents.then_some(self as &dyn RbdDiffSource);
        BlockTarget { image: self, title: "lun 7", size: self.size(), object_size, contents }
    }

    /// Restores the newest point to it.
    fn restore(&self, fixture: &Fixture, contents: bool) -> Result<RestoreReport, RestoreError> {
        let cancel = self.cancel.clone().unwrap_or_default();
        fixture.restore(None).to_block(&self.target(contents, Some(64 << 10)), &(), &cancel)
    }

    fn into_content(self) -> Vec<u8> {
        self.content.into_inner().unwrap()
    }
}

impl BlockImage for MemoryBlock {
    fn write(&self, offset: u64, data: Bytes) -> Result<(), BoxError> {
        let range = offset..offset + data.len() as u64;
        self.change(&range, ExtentKind::Data, |bytes| bytes.copy_from_slice(&data))
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BoxError> {
        self.change(&range, ExtentKind::Zero, |bytes| bytes.fill(0))
    }

    fn flush(&self) -> Result<(), BoxError> {
        *self.flushes.lock().unwrap() += 1;
        if self.fail_flush { Err("a fault on demand".into()) } else { Ok(()) }
    }
}

/// What it holds now.
impl RbdDiffSource for MemoryBlock {
    fn size(&self) -> u64 {
        MemoryBlock::size(self)
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        let segments: Vec<_> = self.snapshot().segments(align).collect();
        Box::new(segments.into_iter())
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        self.snapshot().diff(segment, found)
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        self.snapshot().read(offset, buffer)
    }
}

fn newest(fixture: &Fixture, size: usize) -> Vec<u8> {
    let mut content = fixture.points.last().expect("a point").1.clone();
    content.resize(size, 0);
    content
}

proptest! {
    #![proptest_config(cases(32))]
    #[test]
    fn an_empty_image_is_filled_with_data_only(
        steps in prop::collection::vec((form(), image_steps()), 1..4), larger in 0_usize..100_000
    ) {
        let fixture = Fixture::new(&steps);
        let wanted = newest(&fixture, fixture.points.last().unwrap().1.len() + larger);
        let image = MemoryBlock::new(vec![0; wanted.len()]);
        let report = image.restore(&fixture, false).unwrap();
        prop_assert!(*image.flushes.lock().unwrap() > 0);
        let changes = std::mem::take(&mut *image.changes.lock().unwrap());
        prop_assert!(image.into_content() == wanted);
        let mut written = 0;
        for (range, kind) in changes {
            prop_assert_eq!(kind, ExtentKind::Data);
            written += range.len();
            for grain in wanted[range].chunks(GRAIN) {
                prop_assert!(!is_zero(grain));
            }
        }
        // What pads the last sector is no part of the point.
        prop_assert_eq!((written as u64).min(report.virtual_size), report.bytes_written);
        prop_assert_eq!(report.bytes_written + report.zero_bytes, report.virtual_size);
    }

    /// The image holds another point, damaged, or noise, and has any size that is large enough.
    #[test]
    fn an_image_becomes_what_the_point_is_and_only_what_differs_is_written(
        steps in prop::collection::vec((form(), image_steps()), 1..4),
        which in prop::option::of(any::<Index>()),
        damage in prop::collection::vec((any::<Index>(), 1_usize..70_000, any::<bool>()), 0..5),
        larger in 0_usize..100_000, block in 1_usize..200_000, object_bits in prop::option::of(12_u32..20),
        noise in any::<u64>()
    ) {
        let fixture = Fixture::new(&steps);
        let size = fixture.points.last().unwrap().1.len() + larger;
        let wanted = newest(&fixture, size);
        let mut before = match which {
            Some(which) => which.get(&fixture.points).1.clone(),
            None => {
                let mut noisy = vec![0; size];
                crate::layer::native::testing::fill(&mut noisy, &[], &Stretch::Noise(noise));
                noisy
            }
        };
        before.resize(size, 0);
        if size > 0 {
            for (at, length, zero) in damage {
                let at = at.index(size);
                before[at..(at + length).min(size)].fill(if zero { 0 } else { 0xD5 });
            }
        }
        let image = MemoryBlock { block, ..MemoryBlock::new(before.clone()) };
        let object = object_bits.map(|bits| 1 << bits);
        let report = fixture.restore(None).to_block(&image.target(true, object), &(), &Cancel::new()).unwrap();
        let changes = std::mem::take(&mut *image.changes.lock().unwrap());
        prop_assert!(image.into_content() == wanted);
        let (mut written, mut zeroed) = (0, 0);
        let object = object.map_or(512, |object| object as usize).max(GRAIN);
        for (range, kind) in changes {
            match kind {
                ExtentKind::Data => {
                    written += range.len() as u64;
                    for (at, grain) in wanted[range.clone()].chunks(GRAIN).enumerate() {
                        let start = range.start + at * GRAIN;
                        prop_assert!(before[start..start + grain.len()] != *grain, "rewritten at {}", start);
                    }
                }
                ExtentKind::Zero => {
                    zeroed += range.len() as u64;
                    for piece in before[range].chunks(object) {
                        prop_assert!(!is_zero(piece));
                    }
                }
            }
        }
        prop_assert_eq!((written.min(report.virtual_size), zeroed), (report.bytes_written, report.zero_bytes));
    }
}

/// Restoring again finishes what a fault has cut short.
#[test]
fn faults_are_told_and_mended() {
    let fixture = Fixture::of_sizes(&[1 << 20, (1 << 20) - 300]);
    let wanted = newest(&fixture, 1 << 20);
    let first = wanted.iter().position(|byte| *byte != 0).expect("data") as u64;
    for (number, contents) in [(0, false), (0, true), (1, true), (2, true), (2, false)] {
        let before = vec![if contents { 0x11 } else { 0 }; 1 << 20];
        let mut image = MemoryBlock::new(before);
        match number {
            0 => image.fail_change = Some(first),
            1 => image.fail_read = Some(first),
            _ => image.fail_flush = true,
        }
        let error = image.restore(&fixture, contents).unwrap_err();
        assert!(matches!(&error, RestoreError::Block { title, .. } if title == "lun 7"), "{error:?}");
        let text = crate::error::Causes(&error).to_string();
        assert!(text.contains("a fault on demand"), "{text}");
        (image.fail_change, image.fail_read, image.fail_flush) = (None, None, false);
        image.restore(&fixture, true).expect("mended");
        assert!(image.into_content() == wanted);
    }
}

#[test]
fn a_point_that_does_not_fit_changes_nothing() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    let image = MemoryBlock::new(vec![0x11; (1 << 20) - 1]);
    let error = image.restore(&fixture, true).unwrap_err();
    assert!(
        matches!(error, RestoreError::BlockTooSmall { size: 0xFFFFF, needed: 0x10_0000, .. }),
        "{error:?}"
    );
    assert!(image.changes.lock().unwrap().is_empty());
}

#[test]
fn a_cancel_ends_it() {
    let fixture = Fixture::of_sizes(&[8 << 20, 8 << 20]);
    let image = MemoryBlock { cancel: Some(Cancel::new()), ..MemoryBlock::new(vec![0x11; 8 << 20]) };
    let error = image.restore(&fixture, true).unwrap_err();
    assert!(matches!(error, RestoreError::Cancelled), "{error:?}");
    assert!(image.into_content() != newest(&fixture, 8 << 20));
}

/// An object of which the point has nothing goes as a whole, and just once.
#[test]
fn what_should_be_empty_goes_by_objects() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    let wanted = newest(&fixture, 1 << 20);
    // Data of the point lie in 64 KiB to 256 KiB.
    assert!(is_zero(&wanted[..1 << 16]) && is_zero(&wanted[4 << 16..]));
    let mut before = wanted.clone();
    for at in [5 << 16, (5 << 16) + 9000, (5 << 16) + 60_000, 9 << 16] {
        before[at] = 1;
    }
    let image = MemoryBlock::new(before);
    let report = image.restore(&fixture, true).expect("restored");
    assert_eq!((report.bytes_written, report.zero_bytes), (0, 2 << 16));
    let mut changes = std::mem::take(&mut *image.changes.lock().unwrap());
    changes.sort_by_key(|(range, _)| range.start);
    let object = |number: usize| (number << 16..(number + 1) << 16, ExtentKind::Zero);
    assert_eq!(changes, [object(5), object(9)]);
    assert!(image.into_content() == wanted);
}
