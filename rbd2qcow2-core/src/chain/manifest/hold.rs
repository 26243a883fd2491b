//! What keeps a point from being pruned, as its manifest tells it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{MANIFEST_MAX, Manifest, ManifestError, checksum, spell, wrong};
use crate::chain::names::{ImageName, PointName};

/// Somebody wants a point to stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Why: a text for people.
    pub reason: String,
    /// Since when.
    pub since: jiff::Timestamp,
}

/// A hold as it stands in the file. Nothing here was checked.
#[derive(Serialize, Deserialize)]
pub(super) struct RawHold {
    reason: String,
    since: String,
}

impl From<&Hold> for RawHold {
    fn from(hold: &Hold) -> Self {
        Self { reason: hold.reason.clone(), since: hold.since.to_string() }
    }
}

impl TryFrom<RawHold> for Hold {
    type Error = ManifestError;

    fn try_from(raw: RawHold) -> Result<Self, ManifestError> {
        let since = raw.since.parse().map_err(|_| wrong("hold.since", &raw.since, "a time (RFC 3339)"))?;
        Ok(Self { reason: raw.reason, since })
    }
}

/// The content of a manifest with another hold, or none, and everything else as it was, including keys
/// that this program does not know.
///
/// # Errors
/// Those of [`Manifest::parse`], for the old content and for the new.
pub(in crate::chain) fn with_hold(
    bytes: &[u8],
    image: &ImageName,
    point: PointName,
    hold: Option<&Hold>,
) -> Result<Vec<u8>, ManifestError> {
    Manifest::parse(bytes, image, point)?;
    let mut value: Value = serde_json::from_slice(bytes).map_err(ManifestError::NotJson)?;
    let Some(object) = value.as_object_mut() else { unreachable!("a manifest is an object") };
    object.remove("checksum");
    object.remove("hold");
    if let Some(hold) = hold {
        let raw = serde_json::to_value(RawHold::from(hold)).map_err(ManifestError::Shape)?;
        object.insert("hold".to_owned(), raw);
    }
    let checksum = checksum(&value);
    value["checksum"] = Value::String(checksum);
    let bytes = spell(&value);
    if bytes.len() as u64 > MANIFEST_MAX {
        return Err(ManifestError::TooLong);
    }
    Manifest::parse(&bytes, image, point)?;
    Ok(bytes)
}
