//! A snapshot of an RBD image, compared with an older one through librbd.
//!
//! # What is believed
//! librbd's comparison of whole objects (fast-diff) misses changes: after a rollback the object map
//! says "exists, clean" of objects that differ from the base, and clients wrote wrong dirty bits for
//! years (Ceph tracker 61472, 61616). But an object whose content differs between two snapshots
//! exists in at least one of them, and existence is what the maps are right about. So
//! [`DiffMode::Exact`] asks both snapshots' maps which objects exist, and compares each of those
//! through the OSDs.
//!
//! Four things are not believed at all, and read instead:
//! - "zeroes" where a clone still has a parent: a removed object uncovers the parent's data;
//! - everything behind the smallest size that the image had at a snapshot between the two: what was
//!   cut off and grown again is zero, however little the comparison knows of it;
//! - everything behind a clone's overlap, where the overlap has shrunk: so was the image;
//! - the last, broken sector of an image that has shrunk: see [`RbdDiffSource::diff`].

use std::ops::Range;

use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind};
use crate::layer::SECTOR;
use crate::options::DiffMode;
use crate::rbd::{Granularity, Image, ImageInfo, Pool, RbdError, Snapshot};

/// Objects in a segment, or bytes where objects are small: enough to keep librbd's concurrent
/// requests busy, few enough to spread a small image over all threads.
const SEGMENT_OBJECTS: u64 = 128;
const SEGMENT_BYTES: u64 = 16 << 20;

/// Units whose existence is looked up at a time. With objects of 4 MiB that is 4 TiB, in 128 KiB of
/// memory; each look-up reads a whole object map.
const WINDOW_UNITS: u64 = 1 << 20;

/// A snapshot and the base that it is compared with.
#[derive(Debug)]
pub struct LibrbdSource {
    image: Image,
    info: ImageInfo,
    base: Option<Base>,
    mode: DiffMode,
    fallback: Option<&'static str>,
    /// From here on the comparison is not asked: everything counts as changed.
    suspect_from: u64,
}

#[derive(Debug)]
struct Base {
    name: String,
    image: Image,
    info: ImageInfo,
}

impl LibrbdSource {
    /// Opens `snapshot` of an image, to be compared with the older snapshot `base`, or with nothing
    /// for a full backup. Blocks.
    ///
    /// [`DiffMode::Compare`], which is no business of librbd, counts as [`DiffMode::Exact`].
    ///
    /// Where the object maps that `mode` needs are absent or invalid, it becomes [`DiffMode::Scan`];
    /// see [`fallback`](Self::fallback).
    ///
    /// # Errors
    /// [`RbdError`]; the image or one of the snapshots may not exist.
    pub fn open(
        pool: &Pool,
        image: &str,
        snapshot: &str,
        base: Option<&str>,
        mode: DiffMode,
    ) -> Result<Self, RbdError> {
        let open = |name: &str| -> Result<_, RbdError> {
            let opened = pool.open(image, Some(name))?;
            let info = opened.info()?;
            Ok((opened, info))
        };
        let (handle, info) = open(snapshot)?;
        let base = base
            .map(|name| open(name).map(|(image, info)| Base { name: name.to_owned(), image, info }))
            .transpose()?;
        let suspect_from = match &base {
            Some(base) => suspect_from(&handle, &info, snapshot, base)?,
            None => info.size,
        };
        let mode = if mode == DiffMode::Compare { DiffMode::Exact } else { mode };
        let fallback = match mode {
            DiffMode::Scan => None,
            _ if !info.object_map_valid => Some("the snapshot has no valid object map"),
            _ if base.as_ref().is_some_and(|base| !base.info.object_map_valid) => {
                Some("the base snapshot has no valid object map")
            }
            _ => None,
        };
        let mode = if fallback.is_some() { DiffMode::Scan } else { mode };
        Ok(Self { image: handle, info, base, mode, fallback, suspect_from })
    }

    /// An open image as it is, compared with nothing: all that it holds. Nobody else must write to it
    /// meanwhile. Blocks.
    ///
    /// # Errors
    /// [`RbdError`].
    pub fn contents(image: Image) -> Result<Self, RbdError> {
        let info = image.info()?;
        let mode = if info.object_map_valid { DiffMode::Exact } else { DiffMode::Scan };
        let suspect_from = info.size;
        Ok(Self { image, info, base: None, mode, fallback: None, suspect_from })
    }

    /// The properties of the image at the snapshot.
    #[must_use]
    pub fn info(&self) -> &ImageInfo {
        &self.info
    }

    /// The open image, at the snapshot.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// How changes are really found.
    #[must_use]
    pub fn mode(&self) -> DiffMode {
        self.mode
    }

    /// Why [`mode`](Self::mode) is not the one that was asked for.
    #[must_use]
    pub fn fallback(&self) -> Option<&'static str> {
        self.fallback
    }

    /// What librbd iterates over at a time, in bytes: an object, or a set of objects that share stripes.
    #[must_use]
    pub fn period(&self) -> u64 {
        self.info.object_size.saturating_mul(self.info.stripe_count.max(1))
    }

    /// Marks the units of a window that `diff` must be asked about.
    fn window(&self, mut window: Window) -> Result<Window, RbdError> {
        let range = window.range.clone();
        window.mark(self.suspect_from..range.end);
        if self.base.is_none() {
            // Before 16.2.8 the objects that exist do not include the parent's (tracker 53787).
            window.mark(0..self.info.overlap);
        }
        match (self.mode, &self.base) {
            (DiffMode::Scan, _) => {
                window.mark(range);
                Ok(window)
            }
            (DiffMode::Fast, Some(base)) => window.mark_listed(&self.image, Some(&base.name), range),
            (DiffMode::Fast | DiffMode::Exact | DiffMode::Compare, None) => {
                window.mark_listed(&self.image, None, range)
            }
            (DiffMode::Exact | DiffMode::Compare, Some(base)) => {
                let window = window.mark_listed(&self.image, None, range.clone())?;
                window.mark_listed(&base.image, None, range.start..range.end.min(base.info.size))
            }
        }
    }

    fn compare(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), RbdError> {
        let compared = segment.start..segment.end.min(self.suspect_from);
        if !compared.is_empty() {
            let from = self.base.as_ref().map(|base| base.name.as_str());
            let extents = self.list(from, compared)?;
            self.distrust_zeroes(extents.into_iter(), found);
        }
        let suspect = segment.start.max(self.suspect_from)..segment.end;
        if !suspect.is_empty() {
            // Ranges that do not start at an object have wrong offsets before 16.2.8 (tracker 53784).
            let held = self.list(None, segment)?;
            self.distrust_zeroes(fill_with_zeroes(held, suspect).into_iter(), found);
        }
        Ok(())
    }

    fn list(&self, from: Option<&str>, range: Range<u64>) -> Result<Vec<Extent>, RbdError> {
        self.image.diff(from, range, Granularity::Bytes, from.is_none(), Vec::new(), |found, extent| {
            found.push(extent);
        })
    }

    /// Has zeroes read where a parent may show through.
    fn distrust_zeroes(&self, extents: impl Iterator<Item = Extent>, found: &mut Vec<Extent>) {
        for extent in extents {
            let covered = extent.end().min(self.info.overlap);
            if extent.kind == ExtentKind::Data || extent.offset >= covered {
                found.push(extent);
                continue;
            }
            found.extend(Extent::new(extent.offset..covered, ExtentKind::Data));
            found.extend(Extent::new(covered..extent.end(), ExtentKind::Zero));
        }
    }
}

/// Where the comparison of two snapshots cannot be relied on, to the image's end; the size if nowhere.
fn suspect_from(image: &Image, info: &ImageInfo, snapshot: &str, base: &Base) -> Result<u64, RbdError> {
    let snapshots = image.snapshots()?;
    let id = |name: &str| snapshots.iter().find(|snapshot| snapshot.name == name).map(|found| found.id);
    // Both are open, so both are listed; were one not, everything would be suspect.
    let (Some(first), Some(last)) = (id(&base.name), id(snapshot)) else { return Ok(0) };
    let between = |other: &&Snapshot| first < other.id && other.id < last;
    let smallest = snapshots.iter().filter(between).map(|snapshot| snapshot.size).min();
    // A flattened image has no overlap either, but no parent.
    let shrunk = info.overlap < base.info.overlap && image.parent()?.is_some();
    let overlap = shrunk.then_some(info.overlap);
    let padding = (info.size < base.info.size).then_some(info.size / SECTOR * SECTOR);
    let starts = [smallest, overlap, padding];
    Ok(starts.into_iter().flatten().fold(info.size, u64::min))
}

/// The data among `held` within `range`, and zeroes for all the rest of it.
fn fill_with_zeroes(mut held: Vec<Extent>, range: Range<u64>) -> Vec<Extent> {
    held.retain(|extent| extent.kind == ExtentKind::Data);
    held.sort_unstable_by_key(|extent| extent.offset);
    let mut filled = Vec::with_capacity(held.len() * 2 + 1);
    let mut end = range.start;
    for extent in held {
        let data = extent.offset.clamp(end, range.end)..extent.end().clamp(end, range.end);
        filled.extend(Extent::new(end..data.start, ExtentKind::Zero));
        end = data.end;
        filled.extend(Extent::new(data, ExtentKind::Data));
    }
    filled.extend(Extent::new(end..range.end, ExtentKind::Zero));
    filled
}

impl RbdDiffSource for LibrbdSource {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        Box::new(Segments::new(self, align))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        self.compare(segment.clone(), found)
            .map_err(|cause| SourceError::Diff { range: segment, cause: cause.into() })
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        let length = buffer.len();
        self.image.read(offset, buffer).map_err(|cause| SourceError::Read {
            offset,
            length,
            cause: cause.into(),
        })
    }
}

/// One bit for each unit of a part of the image: whether it must be compared.
struct Window {
    range: Range<u64>,
    unit: u64,
    bits: Vec<u64>,
}

impl Window {
    fn new(range: Range<u64>, unit: u64) -> Self {
        let units = (range.end - range.start).div_ceil(unit);
        let words = usize::try_from(units.div_ceil(64)).expect("a window is small");
        Self { range, unit, bits: vec![0; words] }
    }

    /// Sets the bits of all units that share a byte with `range`.
    fn mark(&mut self, range: Range<u64>) {
        let start = range.start.max(self.range.start);
        let end = range.end.min(self.range.end);
        if start >= end {
            return;
        }
        let first = (start - self.range.start) / self.unit;
        let last = (end - 1 - self.range.start) / self.unit;
        for unit in first..=last {
            let word = usize::try_from(unit / 64).expect("a window is small");
            self.bits[word] |= 1 << (unit % 64);
        }
    }

    /// Sets the bits of all units with an object that the object maps list between `from` and the
    /// image's snapshot; from the beginning of time, those are the objects that exist.
    fn mark_listed(self, image: &Image, from: Option<&str>, range: Range<u64>) -> Result<Self, RbdError> {
        if range.is_empty() {
            return Ok(self);
        }
        image.diff(from, range, Granularity::Objects, false, self, |window, extent| {
            window.mark(extent.range());
        })
    }

    fn is_marked(&self, offset: u64) -> bool {
        let unit = (offset - self.range.start) / self.unit;
        let word = usize::try_from(unit / 64).expect("a window is small");
        self.bits[word] & (1 << (unit % 64)) != 0
    }

    /// The first marked part from `offset` on, at most `longest` bytes.
    fn next_marked(&self, mut offset: u64, longest: u64) -> Option<Range<u64>> {
        while offset < self.range.end && !self.is_marked(offset) {
            offset += self.unit;
        }
        let mut end = offset;
        while end < self.range.end && end - offset < longest && self.is_marked(end) {
            end += self.unit;
        }
        (end > offset).then(|| offset..end.min(self.range.end))
    }
}

/// The image's parts to be compared, window by window.
struct Segments<'a> {
    source: &'a LibrbdSource,
    /// Units start at objects and at grains.
    unit: u64,
    longest: u64,
    window: Window,
    /// Where to go on in the window.
    next: u64,
    failed: bool,
}

impl<'a> Segments<'a> {
    fn new(source: &'a LibrbdSource, align: u64) -> Self {
        let unit = least_common_multiple(source.period(), align);
        let longest = SEGMENT_BYTES.max(SEGMENT_OBJECTS * source.info.object_size);
        Self { source, unit, longest, window: Window::new(0..0, unit), next: 0, failed: false }
    }
}

impl Iterator for Segments<'_> {
    type Item = Result<Range<u64>, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(segment) = self.window.next_marked(self.next, self.longest) {
                self.next = segment.end;
                return Some(Ok(segment));
            }
            let start = self.window.range.end;
            if self.failed || start >= self.source.info.size {
                return None;
            }
            let length = self.unit.saturating_mul(WINDOW_UNITS);
            let range = start..start.saturating_add(length).min(self.source.info.size);
            match self.source.window(Window::new(range.clone(), self.unit)) {
                Ok(window) => (self.window, self.next) = (window, start),
                Err(cause) => {
                    self.failed = true;
                    self.next = self.window.range.end;
                    return Some(Err(SourceError::Segments { range, cause: cause.into() }));
                }
            }
        }
    }
}

fn least_common_multiple(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_give_their_marked_parts() {
        let mut window = Window::new(1000..2000, 10);
        assert_eq!(window.next_marked(1000, 100), None);
        window.mark(0..1001);
        window.mark(1095..1101);
        window.mark(1990..u64::MAX);
        assert_eq!(window.next_marked(1000, 100), Some(1000..1010));
        assert_eq!(window.next_marked(1010, 100), Some(1090..1110));
        assert_eq!(window.next_marked(1010, 10), Some(1090..1100));
        assert_eq!(window.next_marked(1110, 100), Some(1990..2000));
        assert_eq!(window.next_marked(2000, 100), None);
    }

    #[test]
    fn the_last_unit_of_a_window_may_be_ragged() {
        let mut window = Window::new(0..1001, 10);
        window.mark(1000..1001);
        assert_eq!(window.next_marked(0, 100), Some(1000..1001));
    }

    #[test]
    fn what_is_not_held_is_zero() {
        let data = |range: Range<u64>| Extent::new(range, ExtentKind::Data).unwrap();
        let zero = |range: Range<u64>| Extent::new(range, ExtentKind::Zero).unwrap();
        let held = vec![data(30..50), zero(50..60), data(0..12), data(90..200)];
        let filled = fill_with_zeroes(held, 10..100);
        assert_eq!(filled, [data(10..12), zero(12..30), data(30..50), zero(50..90), data(90..100)]);
        assert_eq!(fill_with_zeroes(Vec::new(), 10..20), [zero(10..20)]);
    }

    #[test]
    fn units_are_whole_objects_and_whole_grains() {
        assert_eq!(least_common_multiple(4 << 20, 4096), 4 << 20);
        assert_eq!(least_common_multiple(16 << 10, 64 << 10), 64 << 10);
        assert_eq!(least_common_multiple(3 << 20, 2 << 20), 6 << 20);
    }
}
