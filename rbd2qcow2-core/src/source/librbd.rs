//! A snapshot of an RBD image, compared with an older one through librbd.
//!
//! # What is believed
//! A base point holds what librbd *showed* of its snapshot: what the snapshot's object map and its links to
//! parents made of the objects. The OSDs compare what they *hold*. So an object is compared through the OSDs
//! only where both maps list it, or cannot be asked. Elsewhere:
//! - One that the base's map does not list showed nothing of its own: all that it holds now is new, whatever
//!   the OSDs say of changes.
//! - One that the new map does not list shows nothing of its own any more.
//! - A map that denies an object for which the OSDs list data is wrong, and so is whatever was read through
//!   it: [`Distrust::ObjectMapWrong`]. This is looked at where the OSDs are asked anyway (in a full backup for
//!   nearly all that the map denies), and at the end for samples, and for all that the image's own map lists by
//!   then.
//! - A base's map that lists other objects than at its own backup cannot tell what was shown:
//!   [`Distrust::BaseMapChanged`].
//!
//! librbd's comparison of whole objects (fast-diff) is not believed at all unless asked for
//! ([`DiffMode::Fast`]): it misses changes after a rollback, and clients wrote wrong dirty bits for years (Ceph
//! tracker 61472, 61616).
//!
//! Read instead of believed are:
//! - "zeroes" where a clone still has a parent: a removed object uncovers the parent's data;
//! - everything behind the smallest size that the image had at a snapshot between the two: what was
//!   cut off and grown again is zero, however little the comparison knows of it;
//! - everything behind a clone's overlap, where the overlap has shrunk: so was the image;
//! - the last, broken sector of an image that has shrunk: see [`RbdDiffSource::diff`];
//! - all of an image that is migrating: what it still shows of the old place is in no diff.
//!
//! What shows through from other images is read through links of the moment when the handle was opened: see
//! [`Ancestry`]. [`RbdDiffSource::confirm`] tells whether they held.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind, join};
use crate::layer::SECTOR;
use crate::options::DiffMode;
use crate::rbd::{Ancestry, Granularity, Image, ImageInfo, Pool, RbdError, Snapshot};

mod checks;
mod distrust;
mod existence;
mod listed;
mod window;

pub use distrust::Distrust;
use existence::Pieces;
use listed::{distrust_zeroes, fill, within};
use window::{Known, Segments, Stretch, Window};

/// Windows whose maps are kept for comparisons that are still to come.
const WINDOWS_KEPT: usize = 4;

/// A snapshot that another one is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseSnapshot {
    /// Its name.
    pub name: String,
    /// The digest of its object map when its point was made, as [`LibrbdSource::map_digest`] gave it then.
    /// `None` where there was no valid map, or nobody knows.
    pub map_digest: Option<String>,
    /// The objects that its map listed then, where it is a clone's, as [`LibrbdSource::listed_objects`] gave
    /// them. `None` where nobody knows.
    pub objects: Option<String>,
    /// Bytes from the start that fell through to a parent then; `None` where nobody knows. A flattened image does
    /// not tell any more.
    pub overlap: Option<u64>,
    /// An older snapshot, for a base that writers may have changed after it was read: what changed since that
    /// one is taken for changed, too.
    pub guard: Option<String>,
}

/// A snapshot and the base that it is compared with.
#[derive(Debug)]
pub struct LibrbdSource {
    pool: Pool,
    name: String,
    /// `None` for the image's head.
    snapshot: Option<String>,
    image: Image,
    info: ImageInfo,
    /// As it was before the handle was opened.
    ancestry: Ancestry,
    base: Option<Base>,
    mode: DiffMode,
    fallback: Option<&'static str>,
    /// From here on the comparison is not asked: everything counts as changed.
    suspect_from: u64,
    /// The windows looked at last, the newest at the end.
    windows: Mutex<VecDeque<Arc<Window>>>,
    /// Of the snapshot's map, once all segments were given.
    map_digest: Mutex<Option<String>>,
    listed_objects: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Base {
    name: String,
    image: Image,
    info: ImageInfo,
    map_digest: Option<String>,
    /// What its map listed when its point was made.
    then: Option<Pieces>,
    guard: Option<String>,
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
        base: Option<&BaseSnapshot>,
        mode: DiffMode,
    ) -> Result<Self, RbdError> {
        let first = pool.open(image, Some(snapshot))?;
        let ancestry = pool.ancestry(&first, image)?;
        // The links are looked at before the handle is opened that reads follow: see `Ancestry`.
        let handle = if ancestry.is_alone() { first } else { pool.open(image, Some(snapshot))? };
        let info = handle.info()?;
        let mut suspect_from = info.size;
        let base = match base {
            None => None,
            Some(base) => {
                let BaseSnapshot { name, map_digest, objects, overlap, guard } = base.clone();
                let opened = pool.open(image, Some(&name))?;
                let mut then_info = opened.info()?;
                let start = self::suspect_from(&handle, &info, snapshot, &name, &then_info)?;
                suspect_from = suspect_from.min(start);
                if let Some(guard) = &guard {
                    let older = pool.open(image, Some(guard))?.info()?;
                    let start = self::suspect_from(&handle, &info, snapshot, guard, &older)?;
                    suspect_from = suspect_from.min(start);
                }
                let range = 0..window::end_of(&then_info);
                let then = objects.and_then(|text| Pieces::from_text(&text, range, then_info.stripe_unit));
                let overlap = overlap.unwrap_or(then_info.overlap);
                if info.overlap > overlap {
                    // A parent that was moved shows again what was cut off: no diff tells of that.
                    suspect_from = suspect_from.min(overlap);
                }
                if then.is_some() && info.overlap < overlap {
                    // What showed the parent may be anything by now, and what the map listed then tells
                    // nothing of that. A flatten takes the parent away from the base, too.
                    suspect_from = suspect_from.min(info.overlap);
                }
                then_info.overlap = then_info.overlap.max(overlap);
                Some(Base { name, image: opened, info: then_info, map_digest, then, guard })
            }
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
        Ok(Self {
            pool: pool.clone(),
            name: image.to_owned(),
            snapshot: Some(snapshot.to_owned()),
            image: handle,
            info,
            ancestry,
            base,
            mode,
            fallback,
            suspect_from,
            windows: Mutex::default(),
            map_digest: Mutex::default(),
            listed_objects: Mutex::default(),
        })
    }

    /// An open image as it is, compared with nothing: all that it holds. Nobody else must write to it
    /// meanwhile. `ancestry` is what it was before the image was opened. Blocks.
    ///
    /// # Errors
    /// [`RbdError`].
    pub fn contents(image: Image, name: &str, ancestry: Ancestry) -> Result<Self, RbdError> {
        let info = image.info()?;
        Ok(Self {
            pool: image.pool().clone(),
            name: name.to_owned(),
            snapshot: None,
            mode: if info.object_map_valid { DiffMode::Exact } else { DiffMode::Scan },
            suspect_from: info.size,
            image,
            info,
            ancestry,
            base: None,
            fallback: None,
            windows: Mutex::default(),
            map_digest: Mutex::default(),
            listed_objects: Mutex::default(),
        })
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

    /// The digest of the objects that the snapshot's map lists, in hex, once all segments were given. `None`
    /// before that, where there is no valid map (then the snapshot shows all that the OSDs hold), and for clones, whose
    /// snapshots' maps change with the image.
    #[must_use]
    pub fn map_digest(&self) -> Option<String> {
        self.map_digest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The objects that the map of a clone's snapshot lists, once all segments were given, as a text that
    /// [`BaseSnapshot::objects`] takes. `None` before that, where there is no valid map, where there are more than
    /// 8 million objects, and for images that are no clones.
    #[must_use]
    pub fn listed_objects(&self) -> Option<String> {
        self.listed_objects.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether objects are reported as a whole of which little may have changed: those of a clone that were
    /// written to for the first time.
    #[must_use]
    pub fn reports_whole_objects(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.then.is_some())
    }

    /// What librbd iterates over at a time, in bytes: an object, or a set of objects that share stripes.
    #[must_use]
    pub fn period(&self) -> u64 {
        self.info.object_size.saturating_mul(self.info.stripe_count.max(1))
    }

    /// Whether nothing that the cluster lists of the image is to be believed.
    fn reads_all(&self) -> bool {
        self.ancestry.is_migrating()
    }

    fn compare(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), super::BoxError> {
        if self.reads_all() {
            found.extend(Extent::new(segment, ExtentKind::Data));
            return Ok(());
        }
        let window = self.window_of(&segment)?;
        let stretches: Vec<_> = window.stretches(&segment, self.suspect_from).collect();
        let hull = |wanted: &dyn Fn(&Stretch) -> bool| self.hull(&stretches, &segment, wanted);
        let changed = match (&self.base, hull(&|stretch| self.asks_changes(stretch))) {
            (Some(base), Some(range)) => self.list_changes(base, range)?,
            _ => Vec::new(),
        };
        let (mut own, mut held) =
            (hull(&|stretch| self.asks_own(stretch)), hull(&|stretch| self.asks_held(stretch)));
        if self.info.overlap == 0 {
            // Nothing shows through, so that the two are one.
            own = join_hulls(own, held);
            held = own.clone();
        }
        let own_extents = own.clone().map_or(Ok(Vec::new()), |range| self.list(None, range, false))?;
        let held_extents = match held {
            None => Vec::new(),
            held if held == own && self.info.overlap == 0 => own_extents.clone(),
            Some(range) => self.list(None, range, true)?,
        };
        for stretch in &stretches {
            if stretch.now == Known::No {
                self.deny(&own_extents, stretch)?;
            }
            found.extend(self.changes_of(stretch, &changed, &own_extents, &held_extents));
        }
        *found = join(std::mem::take(found));
        Ok(())
    }

    /// The part of the segment that has to be listed for all stretches that are `wanted`. Ranges that do not
    /// start at an object have wrong offsets before 16.2.8 (tracker 53784).
    fn hull(
        &self,
        stretches: &[Stretch],
        segment: &Range<u64>,
        wanted: &dyn Fn(&Stretch) -> bool,
    ) -> Option<Range<u64>> {
        let mut wanted = stretches.iter().filter(|stretch| wanted(stretch));
        let first = wanted.next()?;
        let last = wanted.next_back().unwrap_or(first);
        let period = self.period();
        let end = last.range.end.div_ceil(period).saturating_mul(period);
        Some(first.range.start / period * period..end.min(segment.end))
    }

    /// Whether the OSDs are asked what changed since the base.
    fn asks_changes(&self, stretch: &Stretch) -> bool {
        let (now, base) = (stretch.now, stretch.base);
        let vanished_or_new =
            now == Known::No && base != Known::Unknown || now == Known::Yes && base == Known::No;
        self.base.is_some() && !stretch.suspect && !vanished_or_new
    }

    /// Whether the OSDs are asked what they hold of the image itself, without its parents.
    fn asks_own(&self, stretch: &Stretch) -> bool {
        let new = self.base.is_some() && stretch.base == Known::No && !stretch.suspect;
        stretch.now == Known::No || new
    }

    /// Whether the OSDs are asked what the image and its parents hold.
    fn asks_held(&self, stretch: &Stretch) -> bool {
        self.base.is_none() || stretch.suspect
    }

    /// What changed in a stretch, by what was listed of it.
    fn changes_of(
        &self,
        stretch: &Stretch,
        changed: &[Extent],
        own: &[Extent],
        held: &[Extent],
    ) -> Vec<Extent> {
        let range = &stretch.range;
        let overlap = self.info.overlap;
        let Some(base) = &self.base else {
            return distrust_zeroes(within(held, range), overlap);
        };
        if stretch.suspect {
            return distrust_zeroes(fill(held, range, ExtentKind::Zero), overlap);
        }
        match (stretch.now, stretch.base) {
            (Known::No, Known::No) => Vec::new(),
            (Known::No, Known::Yes) => distrust_zeroes(Extent::new(range.clone(), ExtentKind::Zero), overlap),
            (now, Known::No) => {
                let since = distrust_zeroes(within(changed, range), overlap);
                let holds = within(own, range).next().is_some();
                // The base showed its parent here, or zeroes; the image now shows what its objects hold.
                let shown = range.start..range.end.min(overlap.max(base.info.overlap)).max(range.start);
                let over_parent = (now == Known::Yes || holds).then(|| fill(own, &shown, ExtentKind::Data));
                let data = within(own, range).filter(|extent| extent.kind == ExtentKind::Data);
                since.into_iter().chain(over_parent.into_iter().flatten()).chain(data).collect()
            }
            _ => distrust_zeroes(within(changed, range), overlap),
        }
    }

    fn list_changes(&self, base: &Base, range: Range<u64>) -> Result<Vec<Extent>, RbdError> {
        let mut changed = self.list(Some(&base.name), range.clone(), false)?;
        if let Some(guard) = &base.guard {
            changed.extend(self.list(Some(guard), range, false)?);
        }
        Ok(changed)
    }

    fn list(
        &self,
        from: Option<&str>,
        range: Range<u64>,
        with_parent: bool,
    ) -> Result<Vec<Extent>, RbdError> {
        self.image.diff(from, range, Granularity::Bytes, with_parent, Vec::new(), |found, extent| {
            found.push(extent);
        })
    }

    /// What the object maps say of a segment.
    fn window_of(&self, segment: &Range<u64>) -> Result<Arc<Window>, RbdError> {
        let windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = windows.iter().rfind(|window| window.covers(segment)) {
            return Ok(window.clone());
        }
        drop(windows);
        Window::read(self, segment.clone()).map(Arc::new)
    }

    fn keep(&self, window: Arc<Window>) {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.len() == WINDOWS_KEPT {
            windows.pop_front();
        }
        windows.push_back(window);
    }
}

/// The smallest range with both.
fn join_hulls(one: Option<Range<u64>>, other: Option<Range<u64>>) -> Option<Range<u64>> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.start.min(other.start)..one.end.max(other.end)),
        (one, other) => one.or(other),
    }
}

/// Where the comparison with an older snapshot cannot be relied on, to the image's end; the size if nowhere.
fn suspect_from(
    image: &Image,
    info: &ImageInfo,
    snapshot: &str,
    older: &str,
    then: &ImageInfo,
) -> Result<u64, RbdError> {
    let snapshots = image.snapshots()?;
    let id = |name: &str| snapshots.iter().find(|snapshot| snapshot.name == name).map(|found| found.id);
    // Both are open, so both are listed; were one not, everything would be suspect.
    let (Some(first), Some(last)) = (id(older), id(snapshot)) else { return Ok(0) };
    let between = |other: &&Snapshot| first < other.id && other.id < last;
    let smallest = snapshots.iter().filter(between).map(|snapshot| snapshot.size).min();
    // A flattened image has no overlap either, but no parent.
    let shrunk = info.overlap < then.overlap && image.parent()?.is_some();
    let overlap = shrunk.then_some(info.overlap);
    let padding = (info.size < then.size).then_some(info.size / SECTOR * SECTOR);
    let starts = [smallest, overlap, padding];
    Ok(starts.into_iter().flatten().fold(info.size, u64::min))
}

impl RbdDiffSource for LibrbdSource {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        Box::new(Segments::new(self, align))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        self.compare(segment.clone(), found).map_err(|cause| SourceError::Diff { range: segment, cause })
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        let length = buffer.len();
        self.image.read(offset, buffer).map_err(|cause| SourceError::Read {
            offset,
            length,
            cause: cause.into(),
        })
    }

    fn confirm(&self) -> Result<(), SourceError> {
        let head = self.pool.open(&self.name, None);
        self.confirm_by(&head.map_err(|cause| SourceError::Unreliable { cause: cause.into() })?)
    }
}
