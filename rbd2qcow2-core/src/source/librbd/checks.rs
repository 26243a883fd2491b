//! Whether what the cluster told holds: looked at where it is cheap, and once all was read.

use super::existence::Pieces;
use super::listed::within;
use super::window::{self, Stretch};
use super::{Distrust, LibrbdSource};
use crate::extent::{Extent, ExtentKind};
use crate::options::DiffMode;
use crate::rbd::{Features, Image};
use crate::source::{BoxError, SourceError};

impl LibrbdSource {
    /// Looks, through other handles, whether what was read can be relied on: see [`Distrust`]. `head` is the image
    /// as it is now, opened since everything was read. Blocks.
    ///
    /// # Errors
    /// [`SourceError::Unreliable`].
    pub fn confirm_by(&self, head: &Image) -> Result<(), SourceError> {
        let unreliable = |cause: BoxError| SourceError::Unreliable { cause };
        self.check_ancestry(head).map_err(unreliable)?;
        self.check_map(head).map_err(unreliable)
    }

    fn check_ancestry(&self, head: &Image) -> Result<(), BoxError> {
        let changed = |change| Distrust::AncestryChanged { image: self.pool.spec(&self.name), change };
        let info = head.info()?;
        if info.id != self.info.id {
            let change = format!("another image has its name (id {}, it was {})", info.id, self.info.id);
            return Err(changed(change).into());
        }
        if self.ancestry.is_alone() {
            // What is on its way shows what it does not hold itself.
            return match info.features.has(Features::MIGRATING) {
                true => Err(changed("its migration began".to_owned()).into()),
                false => Ok(()),
            };
        }
        let later = match &self.snapshot {
            Some(snapshot) => {
                self.pool.open(&self.name, Some(snapshot)).and_then(|at| self.pool.ancestry(&at, &self.name))
            }
            None => self.pool.ancestry(head, &self.name),
        };
        let later = match later {
            Err(error) if error.is_not_found() => return Err(changed(error.to_string()).into()),
            later => later?,
        };
        self.ancestry.difference(&later).map_or(Ok(()), |change| Err(changed(change).into()))
    }

    /// Asks the OSDs for all objects that the image's map denies. Blocks.
    ///
    /// # Errors
    /// [`SourceError::Unreliable`], of [`Distrust::ObjectMapWrong`] where one of them holds data.
    pub fn check_denied(&self) -> Result<(), SourceError> {
        if self.reads_all() || !self.info.object_map_valid {
            return Ok(());
        }
        let size = self.info.size;
        let check = || -> Result<(), BoxError> {
            for part in window::parts(self, size) {
                let blank = || Pieces::new(part.clone(), self.info.stripe_unit);
                let listed = blank().listed(&self.image, None, part.start..part.end.min(size))?;
                let mut denied = blank();
                denied.mark_each(&listed, &listed, |listed, _| !listed);
                self.check_holds_nothing(&denied, &listed)?;
            }
            Ok(())
        };
        check().map_err(|cause| SourceError::Unreliable { cause })
    }

    /// An error where the OSDs hold data in a piece of `suspects` that is not `listed`.
    fn check_holds_nothing(&self, suspects: &Pieces, listed: &Pieces) -> Result<(), BoxError> {
        let mut next = suspects.range().start;
        while let Some(range) = suspects.next_marked(next, self.period(), window::longest(self)) {
            next = range.end;
            let range = range.start..range.end.min(self.info.size);
            if range.is_empty() {
                break;
            }
            let own = self.list(None, range, false)?;
            let held: Vec<_> = own.into_iter().filter(|extent| extent.kind == ExtentKind::Data).collect();
            self.check_still_denied(unlisted(&held, listed))?;
        }
        Ok(())
    }

    /// Asks the OSDs for objects that the snapshot's map denies: those that the head's map lists (they came
    /// later; or a writer that had not heard of the snapshot yet wrote into it), and some others.
    fn check_map(&self, head: &Image) -> Result<(), BoxError> {
        if self.reads_all() || !self.info.object_map_valid || self.snapshot.is_none() {
            return Ok(());
        }
        let now = head.info()?;
        for part in window::parts(self, self.info.size) {
            let blank = || Pieces::new(part.clone(), self.info.stripe_unit);
            let end = part.end.min(self.info.size);
            // The head's first: what is written to a clone meanwhile gets into the maps of both.
            let in_head = part.start.min(now.size)..end.min(now.size);
            let by_head = now.object_map_valid.then(|| blank().listed(head, None, in_head)).transpose()?;
            let listed = blank().listed(&self.image, None, part.start..end)?;
            let mut suspects = blank();
            if let Some(by_head) = &by_head {
                suspects.mark_each(by_head, &listed, |head, listed| head & !listed);
            }
            // A scan has asked for all of them.
            if self.base.is_some() && self.mode != DiffMode::Scan {
                let pieces = (end - part.start).div_ceil(self.info.stripe_unit);
                if pieces <= window::DENIED_FEW {
                    suspects.mark_each(&listed, &listed, |listed, _| !listed);
                } else {
                    suspects.mark_some_besides(&listed, end, window::SAMPLES, window::SAMPLE);
                }
            }
            self.check_holds_nothing(&suspects, &listed)?;
        }
        Ok(())
    }

    /// An error where the OSDs hold data in a stretch that the map denies.
    pub(super) fn deny(&self, own: &[Extent], stretch: &Stretch) -> Result<(), BoxError> {
        let held = within(own, &stretch.range).filter(|extent| extent.kind == ExtentKind::Data);
        self.check_still_denied(held.collect())
    }

    /// An error where one of the extents, which the OSDs hold and the map denied, is denied by right.
    ///
    /// Whoever writes to a clone puts the parent's data into the objects of its snapshots, too, and into their
    /// maps before that. What the snapshot shows stays the same.
    fn check_still_denied(&self, held: Vec<Extent>) -> Result<(), BoxError> {
        let (Some(first), Some(last)) = (held.first(), held.last()) else { return Ok(()) };
        let unit = self.info.stripe_unit;
        let range = first.offset / unit * unit..last.end().max(first.end());
        let mut listed = Pieces::new(range.clone(), unit);
        if self.info.overlap > 0 {
            // The handle that is read through goes by the map of when it was opened.
            let now = self.pool.open(&self.name, self.snapshot.as_deref())?;
            listed = listed.listed(&now, None, range.start..range.end.min(self.info.size))?;
        }
        let beyond = held.iter().find(|extent| extent.end() > self.info.overlap).map(|extent| extent.offset);
        let still = unlisted(&held, &listed).first().map(|extent| extent.offset);
        match still.into_iter().chain(beyond).min() {
            Some(offset) => Err(self.blame(self.map_is_wrong(offset))),
            None => Ok(()),
        }
    }

    /// The reason for what looks like a wrong map. An ancestry that changed looks the same: a flattened image has
    /// objects that a map of before does not list.
    fn blame(&self, wrong: Distrust) -> BoxError {
        let ancestry = self.pool.open(&self.name, None).map_err(BoxError::from);
        match ancestry.and_then(|head| self.check_ancestry(&head)) {
            Err(changed) if changed.is::<Distrust>() => changed,
            _ => wrong.into(),
        }
    }

    fn map_is_wrong(&self, offset: u64) -> Distrust {
        Distrust::ObjectMapWrong {
            image: self.pool.spec(&self.name),
            snapshot: self.snapshot.clone().unwrap_or_else(|| "HEAD".to_owned()),
            rebuild: self.base.as_ref().map(|base| base.name.clone()),
            offset,
        }
    }
}

/// The parts of extents that lie in pieces that are not listed. An extent may go from one object to the next.
fn unlisted(extents: &[Extent], listed: &Pieces) -> Vec<Extent> {
    let mut found = Vec::new();
    for extent in extents {
        let mut start = extent.offset;
        while start < extent.end() {
            let end = listed.same_until(start, extent.end());
            if !listed.is_marked(start) {
                found.extend(Extent::new(start..end, extent.kind));
            }
            start = end;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_that_begins_in_a_listed_piece_and_ends_in_another_is_seen() {
        let extent = |range| Extent::new(range, ExtentKind::Data).unwrap();
        let mut listed = Pieces::new(100..200, 10);
        listed.mark(100..120);
        listed.mark(150..160);
        let found = unlisted(&[extent(110..155), extent(158..165)], &listed);
        assert_eq!(found, [extent(120..150), extent(160..165)]);
        assert!(unlisted(&[extent(101..119)], &listed).is_empty());
    }
}
