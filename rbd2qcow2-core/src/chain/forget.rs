//! Forgetting points that no point builds upon any more.
//!
//! Points that are to be forgotten are noted in a file before the layers that stay take over what they
//! hold, so that the next run can go on. What is noted goes only when no point builds upon it.
//!
//! On disk: JSON, spelled and with a checksum as manifests are: `format` (1), `image`, `points`.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::ChainError;
use super::manifest::{ManifestError, read_bounded, signed, unsigned};
use super::names::{FileKind, PointName};
use super::{ChainWriter, FORGET_FILE, FORGET_PARTIAL, Paths, durable};
use crate::error::Causes;

/// Longest note that is read, in bytes.
const FORGET_MAX: u64 = 16 << 20;

/// Points to be forgotten, as they stand in the file.
#[derive(Serialize, Deserialize)]
struct Forget {
    format: u64,
    image: String,
    points: Vec<String>,
}

impl ChainWriter {
    /// Notes durably which points are to be forgotten, so that the next run goes on if this one does not
    /// come to it. To be called before the merges that make way; where these fail, the note is to be
    /// [withdrawn](Self::withdraw_forgetting).
    ///
    /// # Errors
    /// [`ChainError::Io`]; nothing was changed then.
    pub fn note_forgetting(&self, points: &[PointName]) -> Result<(), ChainError> {
        let (partial, path) = (self.directory.join(FORGET_PARTIAL), self.note());
        let forget = Forget {
            format: 1,
            image: self.image.as_str().to_owned(),
            points: points.iter().map(ToString::to_string).collect(),
        };
        let value = serde_json::to_value(forget);
        let value = value.map_err(|error| ChainError::io("write", &path)(io::Error::from(error)))?;
        durable::write_aside(&partial, &signed(value))?;
        durable::replace(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
        durable::sync_directory(&self.directory)
    }

    /// Removes the note durably, where there is one: nothing is to be forgotten.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the next run may still find the note then.
    pub fn withdraw_forgetting(&self) -> Result<(), ChainError> {
        if durable::remove(&self.note())? { durable::sync_directory(&self.directory) } else { Ok(()) }
    }

    /// Removes the points that were [noted](Self::note_forgetting), the newest first, as far as no point
    /// builds upon them; and the note. Returns those that were removed.
    ///
    /// A layer of which nobody can tell what it builds upon may need anything that is older: that stays,
    /// and so does the note.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the next run goes on.
    pub fn forget(&mut self) -> Result<Vec<PointName>, ChainError> {
        // What the directory shows may be lost again as long as it was not synced: the names of merged
        // layers, for instance, which make way.
        durable::sync_directory(&self.directory)?;
        self.refresh()?;
        let Some(mut points) = self.noted_forgetting()? else { return Ok(Vec::new()) };
        points.sort_unstable();
        let unlinked = self.catalogue.newest_unlinked();
        let (mut gone, mut kept) = (Vec::new(), None);
        for name in points.into_iter().rev() {
            let points = || self.catalogue.points().iter();
            let needed = points().any(|point| point.parent == Some(name) && !gone.contains(&point.name));
            let Some(point) = self.catalogue.point(name) else {
                if self.forget_lost(name, &gone)? {
                    gone.push(name);
                }
                continue;
            };
            // It may have been held since the note was made.
            if needed || point.manifest.as_ref().is_some_and(|manifest| manifest.hold.is_some()) {
                continue;
            }
            if let Some(unlinked) = unlinked.filter(|unlinked| name <= *unlinked) {
                kept = Some(unlinked);
                continue;
            }
            self.remove_point(name)?;
            gone.push(name);
        }
        match kept {
            Some(unlinked) => log::warn!(
                "{}: it cannot be told what {} builds upon; older points that are to go stay until that is \
                 mended, or the file is moved away",
                self.image,
                self.catalogue.path_of(unlinked, FileKind::Layer).display()
            ),
            None => _ = durable::remove(&self.note())?,
        }
        durable::sync_directory(&self.directory)?;
        self.refresh()?;
        Ok(gone)
    }

    /// Removes the files of a point, which none that is there may build upon.
    ///
    /// This is the commit, backwards: the layer gets the name that it had while it was written, and from then
    /// on there is no such point, only left-overs, which the next run removes. Then the manifest goes, and then
    /// the rest: a manifest with no layer beside it would be that of a lost point. The directory is synced in
    /// between, or a power failure could bring back a layer, but not its manifest, or not the layer below.
    ///
    /// # Errors
    /// [`ChainError::Io`]. The point is there, whole, or gone but for left-overs.
    pub(crate) fn remove_point(&self, name: PointName) -> Result<(), ChainError> {
        let Paths { layer, layer_partial, manifest, digests, .. } = Paths::new(self, name);
        match durable::replace(&layer, &layer_partial) {
            Err(ChainError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {}
            // A new name may need room where there is none; and this is to make some. Killed right here, the
            // run would leave what looks like a lost point.
            Err(ChainError::Io { cause, .. }) if is_full(&cause) => _ = durable::remove(&layer)?,
            renamed => renamed?,
        }
        durable::sync_directory(&self.directory)?;
        if durable::remove(&manifest)? {
            durable::sync_directory(&self.directory)?;
        }
        durable::remove(&layer_partial)?;
        durable::remove(&digests)?;
        match self.catalogue.point(name).and_then(|point| point.base) {
            Some(base) => self.drop_base(base),
            None => Ok(()),
        }
    }

    /// Removes what is left of a point that is to be forgotten, and has lost its layer: up to version 0.1.0 an
    /// interrupted run could leave that. `gone` are points that are not there any more. Tells whether it did.
    ///
    /// # Errors
    /// [`ChainError::Io`].
    fn forget_lost(&self, name: PointName, gone: &[PointName]) -> Result<bool, ChainError> {
        let Some(lost) = self.catalogue.lost().iter().find(|lost| lost.name == name) else {
            return Ok(false);
        };
        let needed = lost.needed_by.iter().any(|above| !gone.contains(above));
        // Whether it is held only its manifest tells.
        if needed || lost.manifest.as_ref().is_none_or(|manifest| manifest.hold.is_some()) {
            return Ok(false);
        }
        durable::remove(&self.catalogue.path_of(name, FileKind::Manifest))?;
        durable::remove(&self.catalogue.path_of(name, FileKind::Digests))?;
        Ok(true)
    }

    /// Goes on where an interrupted run has left off. What cannot be removed hinders nobody.
    pub(super) fn finish_forgetting(&mut self) -> Result<(), ChainError> {
        // A note that cannot be read is no reason to take it for none.
        if self.noted_forgetting()?.is_none() {
            return Ok(());
        }
        match self.forget() {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => {
                let gone: Vec<_> = gone.iter().map(ToString::to_string).collect();
                let gone = gone.join(", ");
                log::info!("{}: an interrupted run was to forget {gone}; they are gone now", self.image);
            }
            Err(error) => {
                log::warn!(
                    "{}: cannot remove points that are to go, {}; the next run tries again",
                    self.image,
                    Causes(&error)
                );
                self.refresh()?;
            }
        }
        Ok(())
    }

    fn note(&self) -> PathBuf {
        self.directory.join(FORGET_FILE)
    }

    /// The points that are to be forgotten; `None` where there is no note, or one that nobody
    /// understands, which asks for nothing.
    fn noted_forgetting(&self) -> Result<Option<Vec<PointName>>, ChainError> {
        let path = self.note();
        let not_understood = |why: &str| {
            log::warn!("{}: {why}; nothing is forgotten on its account, delete it", path.display());
            Ok(None)
        };
        let bytes = match read_bounded(&path, FORGET_MAX) {
            Ok(bytes) => bytes,
            Err(ManifestError::Missing) => return Ok(None),
            Err(ManifestError::Read(cause)) => return Err(ChainError::io("read", &path)(cause)),
            Err(_) => return not_understood("this is no list of points"),
        };
        let forget = unsigned(&bytes).and_then(|value| serde_json::from_value::<Forget>(value).ok());
        let Some(forget) = forget.filter(|forget| forget.format == 1) else {
            return not_understood("the list of points that are to go is damaged");
        };
        if forget.image != self.image.as_str() {
            return not_understood("this is the list of another image's points");
        }
        match forget.points.iter().map(|point| PointName::parse(point)).collect::<Result<_, _>>() {
            Ok(points) => Ok(Some(points)),
            Err(_) => not_understood("the list of points that are to go is damaged"),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
