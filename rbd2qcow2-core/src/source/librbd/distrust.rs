//! When every call succeeded, and what was read is worth nothing all the same.

/// Why what the cluster told of a snapshot cannot be relied on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Distrust {
    /// The image, or one that shows through it, was flattened, removed or moved meanwhile: what was read
    /// through the old links may be zeroes or another image's data.
    #[error(
        "where {image} takes its data from changed while it was read: {change}; back it up again when that is over"
    )]
    AncestryChanged {
        /// `POOL/[NAMESPACE/]IMAGE`.
        image: String,
        /// What changed.
        change: String,
    },
    /// An object map denies an object that holds data. What clients read there is not what is stored.
    #[error(
        "the object map of {image}@{snapshot} denies objects that hold data, the first at byte {offset}: clients \
         (a running machine, too) read zeroes there instead. Stop the machine if it can be, run `rbd object-map \
         rebuild {image}`{}, look whether the image is sound, and try again",
        rebuild_too(image, rebuild)
    )]
    ObjectMapWrong {
        /// `POOL/[NAMESPACE/]IMAGE`.
        image: String,
        /// The snapshot; `HEAD` for the image as it is.
        snapshot: String,
        /// Another snapshot whose map is to be rebuilt, too.
        rebuild: Option<String>,
        /// The first byte in the image.
        offset: u64,
    },
    /// The base's object map lists other objects than when its point was made, so what the point holds is not
    /// what the snapshot shows now.
    #[error(
        "the object map of the base snapshot {base:?} of {image} is not what it was when its point was made \
         (rebuilt since?), so the snapshot does not tell what the point holds"
    )]
    BaseMapChanged {
        /// `POOL/[NAMESPACE/]IMAGE`.
        image: String,
        /// The base snapshot.
        base: String,
    },
}

impl Distrust {
    /// Whether another attempt may do better.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::AncestryChanged { .. } | Self::BaseMapChanged { .. } => true,
            Self::ObjectMapWrong { .. } => false,
        }
    }
}

fn rebuild_too(image: &str, snapshot: &Option<String>) -> String {
    snapshot
        .as_ref()
        .map_or_else(String::new, |snapshot| format!(" and `rbd object-map rebuild {image}@{snapshot}`"))
}
