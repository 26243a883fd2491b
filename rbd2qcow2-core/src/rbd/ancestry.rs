//! Where an image's bytes come from, besides its own objects.
//!
//! A handle that is open for reading has no watch: its links to its parent, and the parent's to the
//! grandparent, are those of the moment when it was opened. When a clone is flattened and the parent
//! removed, such a handle goes on asking the parent, and librbd takes what is not there for zeroes, without
//! an error. When the parent lives on, it shows what that holds now. So whoever reads through a handle looks
//! at all links before it is opened, and again, through other handles, when all was read.

use std::fmt;

use super::cluster::Pool;
use super::error::RbdError;
use super::features::Features;
use super::image::Image;

/// An image, and all whose data show through where it holds nothing itself.
///
/// Two are equal when nothing can have changed between them that a reader depends on: links are only ever
/// cut, or lead to another image, and ids are never used again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ancestry {
    /// The image first, then its parent, and so on. Never empty.
    links: Vec<Link>,
}

/// One of them, at the snapshot that is read.
#[derive(Clone, Debug)]
struct Link {
    pool: String,
    namespace: String,
    /// For messages: another name is no other image.
    name: String,
    /// The image's id; of an ancestor its name where librbd does not tell (before Nautilus).
    image_id: String,
    /// The snapshot's id; for the image itself, and where librbd does not tell, nothing.
    snapshot_id: Option<u64>,
    /// Bytes from the start that fall through to the next.
    overlap: u64,
    /// Whether it is on its way to another place.
    migrating: bool,
}

impl PartialEq for Link {
    fn eq(&self, other: &Self) -> bool {
        let key = |link: &Self| {
            let ids = (link.image_id.clone(), link.snapshot_id);
            (link.pool.clone(), link.namespace.clone(), ids, link.overlap, link.migrating)
        };
        key(self) == key(other)
    }
}

impl Eq for Link {}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, namespace, name, .. } = self;
        match namespace.as_str() {
            "" => write!(f, "{pool}/{name}"),
            namespace => write!(f, "{pool}/{namespace}/{name}"),
        }
    }
}

impl Ancestry {
    /// Whether the image shows nothing but its own objects.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.links.len() == 1 && !self.is_migrating()
    }

    /// Whether the image itself is on its way to another place. What it still shows of the old one stands in
    /// no diff, and not among the links either.
    #[must_use]
    pub fn is_migrating(&self) -> bool {
        self.links[0].migrating
    }

    /// What is different in `later`, in words; `None` where nothing is.
    #[must_use]
    pub fn difference(&self, later: &Self) -> Option<String> {
        if self == later {
            return None;
        }
        let (first, second) = (&self.links, &later.links);
        let at = first.iter().zip(second).take_while(|(one, other)| one == other).count();
        Some(match (first.get(at), second.get(at)) {
            (Some(gone), None) => format!("{} lost its parent {gone}", first[at - 1]),
            (None, Some(new)) => format!("{} got a parent, {new}", second[at - 1]),
            (Some(one), Some(other)) if one.image_id != other.image_id || one.pool != other.pool => {
                format!("{one} (id {}) gave way to {other} (id {})", one.image_id, other.image_id)
            }
            (Some(one), Some(other)) if one.migrating != other.migrating => {
                let what = if other.migrating { "began" } else { "ended" };
                format!("the migration of {one} {what}")
            }
            (Some(one), Some(other)) if one.overlap != other.overlap => {
                format!("{one} shows {} bytes of its parent, and showed {}", other.overlap, one.overlap)
            }
            (Some(one), _) => format!("{one} is read at another snapshot"),
            (None, None) => unreachable!("they differ somewhere"),
        })
    }
}

impl Pool {
    /// The ancestry of an image that is open for reading, and was just opened. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`] where an ancestor cannot be opened, [`RbdError::NotUtf8`],
    /// [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn ancestry(&self, image: &Image, name: &str) -> Result<Ancestry, RbdError> {
        let info = image.info()?;
        let mut links = vec![Link {
            pool: self.name().to_owned(),
            namespace: self.namespace().to_owned(),
            name: name.to_owned(),
            image_id: info.id,
            snapshot_id: None,
            overlap: info.overlap,
            migrating: info.features.has(Features::MIGRATING),
        }];
        let mut next = image.parent()?;
        while let Some(parent) = next {
            let pool = self.cluster().pool(&parent.pool, &parent.namespace)?;
            let opened = pool.with_patience(self.patience().clone()).open_parent(&parent)?;
            let info = opened.info()?;
            links.push(Link {
                pool: parent.pool,
                namespace: parent.namespace,
                image_id: parent.image_id.unwrap_or_else(|| parent.image.clone()),
                name: parent.image,
                snapshot_id: parent.snapshot_id,
                overlap: info.overlap,
                migrating: info.features.has(Features::MIGRATING),
            });
            next = opened.parent()?;
        }
        Ok(Ancestry { links })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(id: &str) -> Link {
        Link {
            pool: "rbd".into(),
            namespace: String::new(),
            name: format!("image-{id}"),
            image_id: id.into(),
            snapshot_id: None,
            overlap: 10,
            migrating: false,
        }
    }

    fn of(links: &[Link]) -> Ancestry {
        Ancestry { links: links.to_vec() }
    }

    #[test]
    fn what_became_different_is_told() {
        let (a, b, c) = (link("a"), link("b"), link("c"));
        let whole = of(&[a.clone(), b.clone(), c.clone()]);
        assert_eq!(whole.difference(&whole), None);
        let renamed = Link { name: "other".into(), ..b.clone() };
        assert_eq!(whole.difference(&of(&[a.clone(), renamed, c.clone()])), None);

        let told = |links: &[Link]| whole.difference(&of(links)).expect("they differ");
        assert_eq!(told(&[a.clone(), b.clone()]), "rbd/image-b lost its parent rbd/image-c");
        assert_eq!(told(&[a.clone(), c.clone()]), "rbd/image-b (id b) gave way to rbd/image-c (id c)");
        let migrating = Link { migrating: true, ..b.clone() };
        let told_of = told(&[a.clone(), migrating, c.clone()]);
        assert_eq!(told_of, "the migration of rbd/image-b began");
        let smaller = Link { overlap: 4, ..a.clone() };
        let told_of = told(&[smaller, b.clone(), c.clone()]);
        assert_eq!(told_of, "rbd/image-a shows 4 bytes of its parent, and showed 10");
        let elsewhere = Link { snapshot_id: Some(7), ..c };
        assert_eq!(told(&[a, b, elsewhere]), "rbd/image-c is read at another snapshot");
    }

    #[test]
    fn only_an_image_without_parent_and_migration_is_alone() {
        assert!(of(&[link("a")]).is_alone());
        assert!(!of(&[link("a"), link("b")]).is_alone());
        assert!(!of(&[Link { migrating: true, ..link("a") }]).is_alone());
    }
}
