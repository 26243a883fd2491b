//! A point, as its files tell of it.

use std::path::PathBuf;

use crate::chain::manifest::Manifest;
use crate::chain::names::PointName;
use crate::qcow2::header::Header;

/// Whether a point stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointKind {
    /// Holds the whole image.
    Full,
    /// Holds what changed since its parent.
    Incremental,
}

impl PointKind {
    /// The word that stands for it in reports: `full` or `incremental`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// A point of an image: a layer that is there, sound or not.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Point {
    /// Its name.
    pub name: PointName,
    /// Its layer.
    pub path: PathBuf,
    /// Whether it stands alone; `None` when neither header nor manifest can be read.
    pub kind: Option<PointKind>,
    /// The point it builds upon, which need not exist.
    pub parent: Option<PointName>,
    /// The point, gone by now, whose layer lies between its own and the parent's: a merge has yet to put
    /// the two into one.
    pub base: Option<PointName>,
    /// The layer's header, unless it is unreadable.
    pub header: Option<Header>,
    /// The manifest. Points of the Python tool have none; otherwise its absence is a problem, but
    /// one that leaves the layer readable.
    pub manifest: Option<Manifest>,
    /// What the layer takes on disk, in bytes, with that of the base.
    pub layer_bytes: u64,
    /// The length of the layer's file, in bytes.
    pub file_bytes: u64,
    /// Where its digests are. They need not be there.
    pub digests: PathBuf,
    /// What the layer's header says of what is below; `None` where that cannot be told.
    pub(in crate::chain) linked: Option<Link>,
    /// Whether the point can be read: its layer and all that it builds upon are there and fit
    /// together. Says nothing of their content.
    pub sound: bool,
    /// The first problem of the layer itself that keeps it from being read: its place in the list.
    pub(super) fatal: Option<usize>,
}

/// What a layer builds upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::chain) struct Link {
    /// The point below; `None` where there is none.
    pub(in crate::chain) parent: Option<PointName>,
    /// The point, gone by now, whose layer lies between.
    pub(in crate::chain) base: Option<PointName>,
}

impl Link {
    /// What a manifest says.
    pub(in crate::chain) fn of(manifest: &Manifest) -> Self {
        Self { parent: manifest.parent, base: manifest.base }
    }
}

impl Point {
    /// The point whose layer this one's is directly put upon: that of the base, or else the parent.
    pub(crate) fn below(&self) -> Option<PointName> {
        self.base.or(self.parent)
    }

    /// The image's size in bytes: exact where there is a manifest, else the layer's, which is
    /// rounded up to 512.
    #[must_use]
    pub fn virtual_size(&self) -> Option<u64> {
        let recorded = self.manifest.as_ref().map(|manifest| manifest.record.virtual_size);
        recorded.or(self.header.as_ref().map(|header| header.virtual_size))
    }

    /// The name of the RBD snapshot that the point was taken from.
    #[must_use]
    pub fn snapshot(&self) -> Option<String> {
        match &self.manifest {
            Some(manifest) => Some(manifest.record.snapshot.clone()),
            // The Python tool names both alike.
            None => self.name.is_python().then(|| self.name.to_string()),
        }
    }
}
