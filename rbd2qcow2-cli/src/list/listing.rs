//! What is known of one image: its points, and the chains that they make.

use std::path::Path;

use rbd2qcow2_core::chain::lock::{ChainLock, Holder};
use rbd2qcow2_core::chain::{self, Catalogue, ChainError, ImageName, Point, PointName};

use super::tree::{Forest, Tree};

/// An image as it was found.
#[derive(Debug)]
pub struct Listing {
    /// Its points and whatever is wrong with them.
    pub catalogue: Catalogue,
    /// How the points build upon each other, by their place in the catalogue.
    pub forest: Forest<PointName>,
    /// Whether a run was writing here.
    pub activity: Activity,
}

/// Whether a run writes in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// None does.
    Idle,
    /// This one does.
    Writing(Holder),
    /// We may not look.
    Unknown,
}

impl Listing {
    /// Reads the directory of an image.
    ///
    /// # Errors
    /// Those of [`Catalogue::read`].
    pub fn read(dest: &Path, image: &ImageName) -> Result<Self, ChainError> {
        let directory = chain::image_directory(dest, image);
        // Files of a run that ends, or begins, meanwhile must not seem to be nobody's: so both before
        // and after.
        let before = Activity::of(&directory);
        let catalogue = Catalogue::read(&directory, image)?;
        let activity = if before == Activity::Idle { Activity::of(&directory) } else { before };
        let links: Vec<_> = catalogue.points().iter().map(|point| (point.name, point.parent)).collect();
        Ok(Self { catalogue, forest: Forest::new(&links), activity })
    }

    /// What the layers of some points take on disk, in bytes.
    pub fn bytes(&self, points: &[usize]) -> u64 {
        let points = points.iter().map(|&point| &self.catalogue.points()[point]);
        points.fold(0, |sum, point| sum.saturating_add(point.layer_bytes))
    }

    /// What to call the chain of a tree.
    pub fn chain_name(&self, tree: &Tree<PointName>) -> String {
        let members = self.forest.members(tree);
        let points = || members.iter().map(|&point| &self.catalogue.points()[point]);
        let ids =
            distinct(points().filter_map(|point| Some(point.manifest.as_ref()?.record.chain.to_string())));
        let python = points().any(|point| point.name.is_python());
        let name = match (python, ids.is_empty()) {
            (true, true) => "chain of the Python rbd2qcow2".to_owned(),
            (true, false) => format!("chain of the Python rbd2qcow2, continued as {}", ids.join(", ")),
            (false, true) => "chain of unknown id".to_owned(),
            (false, false) => format!("chain {}", ids.join(", ")),
        };
        match tree.missing {
            Some(missing) => format!("{name} ({missing} is missing)"),
            None => name,
        }
    }

    /// The pools that the points come from, with their namespaces.
    pub fn pools(&self) -> Vec<String> {
        let records =
            self.catalogue.points().iter().filter_map(|point| Some(&point.manifest.as_ref()?.record));
        distinct(records.map(|record| match record.namespace.as_str() {
            "" => record.pool.clone(),
            namespace => format!("{}/{namespace}", record.pool),
        }))
    }

    /// The point below, where it is there.
    pub fn parent(&self, point: &Point) -> Option<&Point> {
        self.catalogue.point(point.parent?)
    }
}

impl Activity {
    fn of(directory: &Path) -> Self {
        match ChainLock::writer(directory) {
            Ok(None) => Self::Idle,
            Ok(Some(writer)) => Self::Writing(writer),
            Err(error) => {
                log::debug!("cannot tell whether a run is writing in {}: {error}", directory.display());
                Self::Unknown
            }
        }
    }
}

/// Each text once, where it comes first.
fn distinct(texts: impl Iterator<Item = String>) -> Vec<String> {
    let mut found = Vec::new();
    for text in texts {
        if !found.contains(&text) {
            found.push(text);
        }
    }
    found
}
