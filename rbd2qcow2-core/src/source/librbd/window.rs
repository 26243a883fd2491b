//! The image, part by part: which objects there were and are, and which are to be compared.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::existence::{MapDigest, Pieces};
use super::{Base, Distrust, LibrbdSource};
use crate::options::DiffMode;
use crate::rbd::{Image, ImageInfo, RbdError};
use crate::source::SourceError;

/// Objects in a segment, or bytes where objects are small: enough to keep librbd's concurrent
/// requests busy, few enough to spread a small image over all threads.
const SEGMENT_OBJECTS: u64 = 128;
const SEGMENT_BYTES: u64 = 16 << 20;

/// Pieces whose existence is looked up at a time. With objects of 4 MiB that is 16 TiB, in 512 KiB of memory
/// for each map; each look-up reads a whole object map.
const WINDOW_PIECES: u64 = 1 << 22;

/// Pieces in a row of which a sample of what the map denies consists. librbd asks for them at once.
pub(super) const SAMPLE: u64 = 32;

/// Samples of an increment, asked for once all was read: a matter of milliseconds.
pub(super) const SAMPLES: u64 = 8;

/// In images of no more pieces than this all that the map denies is asked for, every time.
pub(super) const DENIED_FEW: u64 = 512;

/// In a full backup all that the map denies is asked for, as long as it is no more than this, or than so many
/// times what exists: a question takes 30 us, an object of 4 MiB some ms to read.
const DENIED_ALL: u64 = 8192;
const DENIED_FOR_EACH: u64 = 16;

/// Of clones with more pieces than this the map is not recorded: it takes a megabyte of memory, and at worst two of
/// the manifest.
const RECORDED: u64 = 1 << 23;

/// What a map says of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It is there.
    Yes,
    /// It is not.
    No,
    /// There is no map that could be asked.
    Unknown,
}

/// Bytes of which the maps say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) range: Range<u64>,
    /// What the snapshot's map says.
    pub(super) now: Known,
    /// What the base's map says. Without a base, as of one that holds nothing.
    pub(super) base: Known,
    /// Whether everything counts as changed.
    pub(super) suspect: bool,
}

/// What the maps say of a part of the image, and what of it is to be compared.
#[derive(Debug)]
pub(super) struct Window {
    /// What the snapshot's map lists; `None` without a valid one.
    now: Option<Pieces>,
    /// What the base's map listed when its point was made, or lists now where that is not known; `None` without
    /// a valid one.
    base: Option<Pieces>,
    /// What the base's map lists now; `None` without a valid one.
    listed: Option<Pieces>,
    has_base: bool,
    asked: Pieces,
}

impl Window {
    /// Reads the maps for `range`, which may reach behind the image's end. Blocks.
    pub(super) fn read(source: &LibrbdSource, range: Range<u64>) -> Result<Self, RbdError> {
        let blank = || Pieces::new(range.clone(), source.info.stripe_unit);
        let list = |image: &Image, size: u64| {
            let bytes = range.start.min(size)..range.end.min(size);
            blank().listed(image, None, bytes)
        };
        let valid = source.info.object_map_valid && !source.reads_all();
        let now = valid.then(|| list(&source.image, source.info.size)).transpose()?;
        let with_map = source.base.as_ref().filter(|base| base.info.object_map_valid && !source.reads_all());
        let base = with_map.map(|base| list(&base.image, base.info.size)).transpose()?;
        let then = source.base.as_ref().and_then(|base| base.then.as_ref()).filter(|_| !source.reads_all());
        let shown = then.map(|then| {
            let mut shown = blank();
            shown.mark_as(then);
            shown
        });
        // What the base showed is what its map listed then; what was written to a clone since then is in its
        // snapshots' maps by now.
        let (listed, base) = (base.clone(), shown.or(base));
        let mut window = Self { now, base, listed, has_base: source.base.is_some(), asked: blank() };
        window.ask(source)?;
        Ok(window)
    }

    /// Marks what is to be compared.
    fn ask(&mut self, source: &LibrbdSource) -> Result<(), RbdError> {
        let range = self.asked.range().clone();
        let end = range.end.min(source.info.size);
        self.asked.mark(source.suspect_from..end);
        let Some(now) = self.now.as_ref().filter(|_| source.mode != DiffMode::Scan) else {
            self.asked.mark(range.start..end);
            return Ok(());
        };
        match (&source.base, &self.base) {
            (None, _) => {
                self.asked.mark_each(now, now, |now, _| now);
                // A listing of whole objects does not include the parent's.
                self.asked.mark(0..source.info.overlap);
                let listed = now.marked();
                let all =
                    (range.start..end).end.saturating_sub(range.start).div_ceil(source.info.stripe_unit);
                let most = DENIED_ALL.max(listed.saturating_mul(DENIED_FOR_EACH));
                if all.saturating_sub(listed) <= most {
                    self.asked.mark(range.start..end);
                } else {
                    self.asked.mark_some_besides(now, end, DENIED_ALL / SAMPLE, SAMPLE);
                }
            }
            (Some(since), Some(base)) => {
                if source.mode == DiffMode::Fast {
                    self.asked.mark_each(now, base, |now, base| now ^ base);
                    let asked = Pieces::new(range.clone(), source.info.stripe_unit);
                    let dirty = asked.listed(&source.image, Some(&since.name), range.start..end)?;
                    self.asked.mark_each(&dirty, &dirty, |dirty, _| dirty);
                } else {
                    self.asked.mark_each(now, base, |now, base| now | base);
                }
            }
            // There is no such mode without both maps.
            (Some(_), None) => self.asked.mark(range.start..end),
        }
        Ok(())
    }

    pub(super) fn covers(&self, segment: &Range<u64>) -> bool {
        let range = self.asked.range();
        range.start <= segment.start && segment.end <= range.end
    }

    /// The parts of a segment of which the maps say the same, ascending. What is not asked for belongs to
    /// those: a segment is whole units.
    pub(super) fn stretches(&self, segment: &Range<u64>, suspect_from: u64) -> impl Iterator<Item = Stretch> {
        let known = |map: &Option<Pieces>, at| match map {
            None => Known::Unknown,
            Some(pieces) if pieces.is_marked(at) => Known::Yes,
            Some(_) => Known::No,
        };
        let until = |map: &Option<Pieces>, at, limit| {
            map.as_ref().map_or(limit, |pieces| pieces.same_until(at, limit))
        };
        let mut next = segment.start;
        let end = segment.end;
        std::iter::from_fn(move || {
            let start = next;
            if start >= end {
                return None;
            }
            let suspect = start >= suspect_from;
            let mut limit = if suspect { end } else { end.min(suspect_from) };
            limit = until(&self.now, start, limit);
            limit = until(&self.base, start, limit);
            next = limit;
            let base = if self.has_base { known(&self.base, start) } else { Known::No };
            Some(Stretch { range: start..limit, now: known(&self.now, start), base, suspect })
        })
    }
}

/// Where the last stripe unit of an image ends.
pub(super) fn end_of(info: &ImageInfo) -> u64 {
    info.size.div_ceil(info.stripe_unit).saturating_mul(info.stripe_unit)
}

/// The longest segment in bytes.
pub(super) fn longest(source: &LibrbdSource) -> u64 {
    SEGMENT_BYTES.max(SEGMENT_OBJECTS * source.info.object_size)
}

/// The parts of an image of `size` bytes whose maps are looked at at a time, in whole `unit`s.
fn parts_of(piece: u64, unit: u64, size: u64) -> impl Iterator<Item = Range<u64>> {
    let length = (piece.saturating_mul(WINDOW_PIECES) / unit).max(1).saturating_mul(unit);
    let mut start = 0_u64;
    std::iter::from_fn(move || {
        let part = start..start.saturating_add(length).min(size.div_ceil(unit).saturating_mul(unit));
        start = part.end;
        (part.start < size).then_some(part)
    })
}

/// The parts of an image of `size` bytes whose maps are looked at at a time.
pub(super) fn parts(source: &LibrbdSource, size: u64) -> impl Iterator<Item = Range<u64>> {
    parts_of(source.info.stripe_unit, source.period(), size)
}

/// The image's parts to be compared, window by window.
pub(super) struct Segments<'a> {
    source: &'a LibrbdSource,
    /// Units start at objects and at grains.
    unit: u64,
    parts: Box<dyn Iterator<Item = Range<u64>> + Send>,
    window: Option<Arc<Window>>,
    /// Where to go on in the window.
    next: u64,
    now: MapDigest,
    base: MapDigest,
    /// What the map of a clone lists.
    all: Option<Pieces>,
    ended: bool,
}

impl<'a> Segments<'a> {
    pub(super) fn new(source: &'a LibrbdSource, align: u64) -> Self {
        let unit = least_common_multiple(source.period(), align);
        // What the base held behind the image's end is only looked at for the digest of its map.
        let size = source.base.as_ref().map_or(0, |base| base.info.size).max(source.info.size);
        Self {
            source,
            unit,
            parts: Box::new(parts_of(source.info.stripe_unit, unit, size)),
            window: None,
            next: 0,
            now: MapDigest::default(),
            base: MapDigest::default(),
            all: Self::list_of_all(source),
            ended: false,
        }
    }

    /// Room for what the map of a clone lists.
    fn list_of_all(source: &LibrbdSource) -> Option<Pieces> {
        let ImageInfo { overlap, object_map_valid, stripe_unit, .. } = source.info;
        let end = end_of(&source.info);
        let wanted = overlap > 0 && object_map_valid && !source.reads_all() && end / stripe_unit <= RECORDED;
        wanted.then(|| Pieces::new(0..end, stripe_unit))
    }

    /// Looks at the next part of the maps.
    fn advance(&mut self, part: Range<u64>) -> Result<(), RbdError> {
        self.next = part.start;
        let window = Arc::new(Window::read(self.source, part)?);
        if let Some(now) = &window.now {
            self.now.add(now);
        }
        if let Some(listed) = &window.listed {
            self.base.add(listed);
        }
        if let (Some(all), Some(now)) = (&mut self.all, &window.now) {
            all.mark_as(now);
        }
        if window.asked.marked() > 0 {
            self.source.keep(window.clone());
        }
        self.window = Some(window);
        Ok(())
    }

    /// What the digests of the maps tell once all of them were read.
    fn end(&mut self) -> Result<(), Distrust> {
        let (now, base) = (std::mem::take(&mut self.now).finish(), std::mem::take(&mut self.base).finish());
        let source = self.source;
        // Of a clone, whatever is written also puts the parent's data into the snapshots' objects, and their
        // maps tell.
        if source.info.object_map_valid && source.info.overlap == 0 && !source.reads_all() {
            *source.map_digest.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        }
        *source.listed_objects.lock().unwrap_or_else(PoisonError::into_inner) =
            self.all.take().and_then(|all| all.to_text());
        match &source.base {
            // One that is flagged invalid by now tells nothing, and is not asked: removing an older snapshot
            // with such a map is enough for that.
            Some(Base { map_digest: Some(then), name, info, .. })
                if info.object_map_valid && *then != base =>
            {
                Err(Distrust::BaseMapChanged { image: source.pool.spec(&source.name), base: name.clone() })
            }
            _ => Ok(()),
        }
    }
}

impl Iterator for Segments<'_> {
    type Item = Result<Range<u64>, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let size = self.source.info.size;
        while !self.ended {
            if let Some(window) = &self.window
                && let Some(segment) = window.asked.next_marked(self.next, self.unit, longest(self.source))
                && segment.start < size
            {
                self.next = segment.end;
                return Some(Ok(segment.start..segment.end.min(size)));
            }
            let failed = |range, cause| Some(Err(SourceError::Segments { range, cause }));
            match self.parts.next() {
                Some(part) => {
                    if let Err(cause) = self.advance(part.clone()) {
                        self.ended = true;
                        return failed(part, cause.into());
                    }
                }
                None => {
                    self.ended = true;
                    if let Err(distrust) = self.end() {
                        return failed(0..size, distrust.into());
                    }
                }
            }
        }
        None
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
#[allow(clippy::single_range_in_vec_init, reason = "lists of one range")]
mod tests {
    use super::*;

    #[test]
    fn units_are_whole_objects_and_whole_grains() {
        assert_eq!(least_common_multiple(4 << 20, 4096), 4 << 20);
        assert_eq!(least_common_multiple(16 << 10, 64 << 10), 64 << 10);
        assert_eq!(least_common_multiple(3 << 20, 2 << 20), 6 << 20);
    }

    #[test]
    fn parts_are_whole_units_and_cover_the_image() {
        let parts: Vec<_> = parts_of(1 << 22, 1 << 22, (20 << 40) + 5).collect();
        assert_eq!(parts, [0..16 << 40, 16 << 40..(20 << 40) + (1 << 22)]);
        let parts: Vec<_> = parts_of(3, 9, 10).collect();
        assert_eq!(parts, [0..18]);
        assert_eq!(parts_of(8, 8, 0).count(), 0);
    }

    fn pieces(marked: &[Range<u64>]) -> Pieces {
        let mut pieces = Pieces::new(0..100, 10);
        marked.iter().for_each(|range| pieces.mark(range.clone()));
        pieces
    }

    #[test]
    fn stretches_end_where_one_of_the_maps_changes() {
        let window = Window {
            now: Some(pieces(&[0..30, 50..60])),
            base: Some(pieces(&[20..60])),
            listed: None,
            has_base: true,
            asked: pieces(&[0..100]),
        };
        let stretch = |range, now, base, suspect| Stretch { range, now, base, suspect };
        let (yes, no) = (Known::Yes, Known::No);
        assert_eq!(
            window.stretches(&(0..95), 90).collect::<Vec<_>>(),
            [
                stretch(0..20, yes, no, false),
                stretch(20..30, yes, yes, false),
                stretch(30..50, no, yes, false),
                stretch(50..60, yes, yes, false),
                stretch(60..90, no, no, false),
                stretch(90..95, no, no, true),
            ]
        );
        let without_maps = Window { now: None, base: None, listed: None, has_base: true, asked: pieces(&[]) };
        let all = stretch(0..95, Known::Unknown, Known::Unknown, false);
        assert_eq!(without_maps.stretches(&(0..95), 1000).collect::<Vec<_>>(), [all]);
    }
}
