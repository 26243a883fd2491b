//! The manifest of a point: where it came from, and what it takes to recreate the image as it was.
//!
//! # On disk
//! A JSON object with sorted keys, indented by two spaces, and a line feed at the end: one content
//! has one spelling, and the reader insists on it. The key `checksum` is the BLAKE3 hash, in hex, of
//! the same text without that key. So whatever byte changes, the manifest no longer counts. Whoever
//! edits one by hand makes it worthless, and is meant to.
//!
//! `format` is 1. A later version of the program that only adds keys keeps this number, and readers
//! ignore keys that they do not know (their checksum covers them nevertheless); one that changes a
//! meaning counts up, and older readers refuse.
//!
//! The keys and values of the image's metadata are byte strings in Ceph. They are stored as they are
//! where they are UTF-8 and do not begin with `hex:`; all others are `hex:` and two lower-case hex
//! digits a byte.
//!
//! `unverified` names, in ascending order, the points without digests that this one has taken over; it is
//! left out where there are none. What the layer holds of them are the bytes that they held when they were
//! taken over, which nobody could hold against what had been backed up.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digests::DigestsInfo;
use super::names::{ChainId, ImageName, PointName, SnapshotName};
use crate::qcow2::SECTOR;
use crate::qcow2::header::ClusterBits;
use crate::qcow2::open_regular;

mod hold;
mod text;
mod unverified;

pub use hold::Hold;
use hold::RawHold;
pub(super) use hold::with_hold;
use text::{metadata, to_text};
use unverified::parse_unverified;

/// The format that is written, and the only one that is read.
pub const FORMAT: u64 = 1;

/// Longest manifest that is read, in bytes. Metadata of an image is some KiB at most.
pub const MANIFEST_MAX: u64 = 16 << 20;

/// Why a manifest is not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// There is none.
    #[error("the manifest does not exist")]
    Missing,
    /// The file could not be opened or read.
    #[error("the manifest cannot be read")]
    Read(#[source] io::Error),
    /// The path leads to something else than a file.
    #[error("the manifest is not a regular file")]
    NotARegularFile,
    /// Longer than [`MANIFEST_MAX`].
    #[error("the manifest is longer than {MANIFEST_MAX} bytes")]
    TooLong,
    /// The bytes are no JSON object.
    #[error("the manifest is damaged: it is not a JSON object")]
    NotJson(#[source] serde_json::Error),
    /// Written by another version of the program.
    #[error(
        "the manifest has format {found}, this program reads only format {FORMAT}: use a newer rbd2qcow2"
    )]
    Format {
        /// What the manifest says.
        found: String,
    },
    /// The checksum, or the spelling, is not that of the content.
    #[error("the manifest is damaged or was edited: its checksum does not match")]
    Checksum,
    /// A key is missing, or its value has another type.
    #[error("the manifest lacks a key or holds one of the wrong type")]
    Shape(#[source] serde_json::Error),
    /// A value that cannot be true.
    #[error("the manifest's {key} is {value:?}, which is not {rule}")]
    Value {
        /// Which key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// The manifest of something else.
    #[error("the manifest is that of {found}, in a file named for {expected}")]
    Misplaced {
        /// What it describes.
        found: String,
        /// What the file's name says.
        expected: String,
    },
}

/// The features of an RBD image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// The bits as librbd tells them.
    pub bits: u64,
    /// The names of those bits that have one, as `rbd info` shows them.
    pub names: Vec<String>,
}

/// The snapshot that an image was cloned from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneParent {
    /// Its pool.
    pub pool: String,
    /// Its namespace; empty for the default one.
    pub namespace: String,
    /// Its image.
    pub image: String,
    /// The id of that image, where librbd tells.
    pub image_id: Option<String>,
    /// Its snapshot.
    pub snapshot: String,
    /// How many bytes of the clone, from its start, still show through to the parent.
    pub overlap: u64,
}

/// What a run knows of the point it backed up: the part of a manifest that comes from the source and
/// the copy, not from the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Whose snapshots these are.
    pub chain: ChainId,
    /// When the backup was made.
    pub created: jiff::Timestamp,
    /// Identifies the Ceph cluster. Empty where the source does not know it, and no incremental
    /// backup builds upon that.
    pub fsid: String,
    /// The image's pool.
    pub pool: String,
    /// The image's namespace; empty for the default one.
    pub namespace: String,
    /// The image's id, which a new image of the same name does not share. Empty where the source
    /// does not know it (format 1 images have none), and no incremental backup builds upon that.
    pub image_id: String,
    /// The snapshot that was read.
    pub snapshot: String,
    /// Its id, which a new snapshot of the same name does not share.
    pub snapshot_id: u64,
    /// The image's size in bytes, exactly. The layer's is this rounded up to 512.
    pub virtual_size: u64,
    /// Bytes of an object.
    pub object_size: u64,
    /// Bytes of a stripe unit.
    pub stripe_unit: u64,
    /// Objects a stripe spans.
    pub stripe_count: u64,
    /// The image's features.
    pub features: Features,
    /// The image's metadata.
    pub metadata: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The snapshot that the image was cloned from, unless it stands alone.
    pub clone_parent: Option<CloneParent>,
    /// How the changes were found: `exact`, `scan`, `fast` or `full`.
    pub diff_mode: String,
    /// A digest of the objects that the snapshot's object map listed when it was read, in hex; `None` where
    /// there was no valid one, or nobody looked. A point holds what such a map made of the image.
    pub object_map: Option<String>,
    /// Of a clone's snapshot the objects that its object map listed when it was read, one bit for each stripe unit
    /// (the lowest bit of the first byte first), packed by zstd, in hex. `None` as for `object_map`.
    pub objects: Option<String>,
    /// Extents of data in the layer.
    pub data_extents: u64,
    /// Bytes of data in the layer.
    pub data_bytes: u64,
    /// Extents of zeroes in the layer.
    pub zero_extents: u64,
    /// Bytes of zeroes in the layer.
    pub zero_bytes: u64,
    /// What wrote the layer: `native` or `qemu-nbd`.
    pub writer: String,
    /// How clusters are packed: `none`, `zlib`, or `zstd` with or without `:` and a level.
    pub compression: String,
    /// Bytes of a cluster of the layer.
    pub cluster_size: u32,
    /// Whether the layer's clusters have subclusters.
    pub extended_l2: bool,
}

impl Record {
    /// The virtual size of the layer: the image's, rounded up to what QEMU can tell.
    #[must_use]
    pub fn layer_size(&self) -> u64 {
        self.virtual_size.next_multiple_of(SECTOR)
    }
}

/// The manifest of a point, valid in itself: every name, number and hash has its form, and it
/// belongs to the file it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The program that wrote it, with its version.
    pub tool: String,
    /// The image.
    pub image: ImageName,
    /// The point.
    pub point: PointName,
    /// The point that the layer builds upon; `None` for a full backup.
    pub parent: Option<PointName>,
    /// The point, gone by now, whose layer lies between this one's and the parent's, under its
    /// [base name](super::names::PointFile::base_name); `None` where there is none.
    pub base: Option<PointName>,
    /// What the run knew.
    pub record: Record,
    /// Length of the layer's file at the commit, in bytes. A shorter file is cut off.
    pub file_bytes: u64,
    /// What the layer took on disk at the commit, in bytes.
    pub layer_bytes: u64,
    /// The file of digests.
    pub digests: DigestsInfo,
    /// Whether, and why, the point must not be pruned.
    pub hold: Option<Hold>,
    /// Points that are gone, or are below, whose data the layer may hold although they never had digests:
    /// its own digests tell of those data what they were when the point took them over, no more.
    pub unverified: BTreeSet<PointName>,
}

/// A manifest as it stands in the file. Nothing here was checked.
#[derive(Serialize, Deserialize)]
struct RawManifest {
    format: u64,
    tool: String,
    chain: String,
    image: String,
    point: String,
    parent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    created: String,
    fsid: String,
    pool: String,
    namespace: String,
    image_id: String,
    snapshot: String,
    snapshot_id: u64,
    virtual_size: u64,
    object_size: u64,
    stripe_unit: u64,
    stripe_count: u64,
    features: Features,
    metadata: BTreeMap<String, String>,
    clone_parent: Option<CloneParent>,
    diff_mode: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    object_map: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    objects: Option<String>,
    data_extents: u64,
    data_bytes: u64,
    zero_extents: u64,
    zero_bytes: u64,
    layer_bytes: u64,
    file_bytes: u64,
    writer: String,
    compression: String,
    cluster_size: u32,
    extended_l2: bool,
    digests: RawDigests,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hold: Option<RawHold>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unverified: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct RawDigests {
    bytes: u64,
    blake3: String,
}

impl Manifest {
    /// The name and version that this program writes as `tool`.
    #[must_use]
    pub fn this_tool() -> String {
        format!("rbd2qcow2 {}", env!("CARGO_PKG_VERSION"))
    }

    /// Reads the manifest at `path`, which by its name is that of `point` of `image`. Reads at most
    /// [`MANIFEST_MAX`] bytes, and follows no symbolic link.
    ///
    /// # Errors
    /// [`ManifestError::Missing`], [`ManifestError::Read`], [`ManifestError::NotARegularFile`],
    /// [`ManifestError::TooLong`], and those of [`parse`](Self::parse).
    pub fn read(path: &Path, image: &ImageName, point: PointName) -> Result<Self, ManifestError> {
        let bytes = read_bounded(path, MANIFEST_MAX)?;
        Self::parse(&bytes, image, point)
    }

    /// Parses the content of a manifest that is found under the name of `point` of `image`.
    ///
    /// # Errors
    /// Every [`ManifestError`] that is not about reading files.
    pub fn parse(bytes: &[u8], image: &ImageName, point: PointName) -> Result<Self, ManifestError> {
        let value: Value = serde_json::from_slice(bytes).map_err(ManifestError::NotJson)?;
        let found = &value["format"];
        if *found != FORMAT {
            return Err(ManifestError::Format { found: found.to_string() });
        }
        // The spelling is compared too: or a flipped bit in white space, or a doubled key, would go
        // unnoticed.
        let value = unsigned(bytes).ok_or(ManifestError::Checksum)?;
        let raw: RawManifest = serde_json::from_value(value).map_err(ManifestError::Shape)?;
        let manifest = Self::validate(raw)?;
        if manifest.image != *image || manifest.point != point {
            return Err(ManifestError::Misplaced {
                found: format!("{}@{}", manifest.image, manifest.point),
                expected: format!("{image}@{point}"),
            });
        }
        Ok(manifest)
    }

    /// The content of the manifest's file.
    ///
    /// # Errors
    /// [`ManifestError::Value`] for whatever [`parse`](Self::parse) would not accept, so that no
    /// point is committed that cannot be read again.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let bytes = signed(serde_json::to_value(self.to_raw()).map_err(ManifestError::Shape)?);
        if bytes.len() as u64 > MANIFEST_MAX {
            return Err(ManifestError::TooLong);
        }
        let read_again = Self::parse(&bytes, &self.image, self.point)?;
        debug_assert_eq!(read_again, *self, "a manifest must survive being written");
        Ok(bytes)
    }

    fn to_raw(&self) -> RawManifest {
        let record = self.record.clone();
        RawManifest {
            format: FORMAT,
            tool: self.tool.clone(),
            chain: record.chain.to_string(),
            image: self.image.as_str().to_owned(),
            point: self.point.to_string(),
            parent: self.parent.map(|parent| parent.to_string()),
            base: self.base.map(|base| base.to_string()),
            created: record.created.to_string(),
            fsid: record.fsid,
            pool: record.pool,
            namespace: record.namespace,
            image_id: record.image_id,
            snapshot: record.snapshot,
            snapshot_id: record.snapshot_id,
            virtual_size: record.virtual_size,
            object_size: record.object_size,
            stripe_unit: record.stripe_unit,
            stripe_count: record.stripe_count,
            features: record.features,
            metadata: record.metadata.iter().map(|(key, value)| (to_text(key), to_text(value))).collect(),
            clone_parent: record.clone_parent,
            diff_mode: record.diff_mode,
            object_map: record.object_map,
            objects: record.objects,
            data_extents: record.data_extents,
            data_bytes: record.data_bytes,
            zero_extents: record.zero_extents,
            zero_bytes: record.zero_bytes,
            layer_bytes: self.layer_bytes,
            file_bytes: self.file_bytes,
            writer: record.writer,
            compression: record.compression,
            cluster_size: record.cluster_size,
            extended_l2: record.extended_l2,
            digests: RawDigests {
                bytes: self.digests.bytes,
                blake3: self.digests.blake3.to_hex().to_string(),
            },
            hold: self.hold.as_ref().map(RawHold::from),
            unverified: self.unverified.iter().map(ToString::to_string).collect(),
        }
    }

    /// The only way from what a file says to a manifest.
    fn validate(raw: RawManifest) -> Result<Self, ManifestError> {
        check_sizes(&raw)?;
        let chain = ChainId::parse(&raw.chain).map_err(|_| wrong("chain", &raw.chain, "8 hex digits"))?;
        let point = parse_point("point", &raw.point)?;
        let parent = raw.parent.as_deref().map(|parent| parse_point("parent", parent)).transpose()?;
        let base = raw.base.as_deref().map(|base| parse_point("base", base)).transpose()?;
        if parent.is_some_and(|parent| parent >= point) {
            return Err(wrong("parent", parent.unwrap_or(point), "older than the point"));
        }
        if base.is_some_and(|base| base >= point || parent.is_some_and(|parent| parent >= base)) {
            return Err(wrong(
                "base",
                base.unwrap_or(point),
                "older than the point, and newer than its parent",
            ));
        }
        let unverified = parse_unverified(&raw.unverified, point)?;
        // Only snapshots of this form are ever deleted, and only by those whose id they carry.
        if let Ok(name) = SnapshotName::parse(&raw.snapshot)
            && name != (SnapshotName { chain, point })
        {
            return Err(wrong("snapshot", &raw.snapshot, "that of this chain and point"));
        }
        let image = ImageName::new(raw.image.clone()).map_err(|_| wrong("image", &raw.image, "a name"))?;
        let hash = blake3::Hash::from_hex(&raw.digests.blake3);
        let blake3 = hash.map_err(|_| wrong("digests.blake3", &raw.digests.blake3, "a BLAKE3 hash"))?;
        let created = raw.created.parse();
        let record = Record {
            chain,
            created: created.map_err(|_| wrong("created", &raw.created, "a time (RFC 3339)"))?,
            fsid: raw.fsid,
            pool: raw.pool,
            namespace: raw.namespace,
            image_id: raw.image_id,
            snapshot: raw.snapshot,
            snapshot_id: raw.snapshot_id,
            virtual_size: raw.virtual_size,
            object_size: raw.object_size,
            stripe_unit: raw.stripe_unit,
            stripe_count: raw.stripe_count,
            features: raw.features,
            metadata: metadata(&raw.metadata)?,
            clone_parent: raw.clone_parent,
            diff_mode: raw.diff_mode,
            object_map: raw.object_map,
            objects: raw.objects,
            data_extents: raw.data_extents,
            data_bytes: raw.data_bytes,
            zero_extents: raw.zero_extents,
            zero_bytes: raw.zero_bytes,
            writer: raw.writer,
            compression: raw.compression,
            cluster_size: raw.cluster_size,
            extended_l2: raw.extended_l2,
        };
        let digests = DigestsInfo { bytes: raw.digests.bytes, blake3 };
        let (file_bytes, layer_bytes) = (raw.file_bytes, raw.layer_bytes);
        let hold = raw.hold.map(Hold::try_from).transpose()?;
        Ok(Self {
            tool: raw.tool,
            image,
            point,
            parent,
            base,
            record,
            file_bytes,
            layer_bytes,
            digests,
            hold,
            unverified,
        })
    }
}

fn check_sizes(raw: &RawManifest) -> Result<(), ManifestError> {
    // So that rounding up, and every offset in the image, fits in a signed 64-bit number.
    if raw.virtual_size > i64::MAX as u64 - SECTOR {
        return Err(wrong("virtual_size", raw.virtual_size, "less than 8 EiB"));
    }
    if !raw.object_size.is_power_of_two() {
        return Err(wrong("object_size", raw.object_size, "a power of two"));
    }
    if raw.stripe_unit == 0 || raw.stripe_unit > raw.object_size {
        return Err(wrong("stripe_unit", raw.stripe_unit, "from 1 to the object size"));
    }
    if raw.stripe_count == 0 {
        return Err(wrong("stripe_count", raw.stripe_count, "at least 1"));
    }
    if ClusterBits::from_size(raw.cluster_size.into()).is_none() {
        return Err(wrong("cluster_size", raw.cluster_size, "a power of two from 512 to 2 MiB"));
    }
    Ok(())
}

fn parse_point(key: &'static str, text: &str) -> Result<PointName, ManifestError> {
    PointName::parse(text).map_err(|_| wrong(key, text, "the name of a point"))
}

fn wrong(key: &'static str, value: impl ToString, rule: &'static str) -> ManifestError {
    ManifestError::Value { key, value: value.to_string(), rule }
}

/// The hash of a manifest that lacks its checksum, in hex.
fn checksum(value: &Value) -> String {
    blake3::hash(&spell(value)).to_hex().to_string()
}

/// The one spelling of a JSON value: sorted keys, two spaces, a line feed.
fn spell(value: &Value) -> Vec<u8> {
    let mut value = value.clone();
    // Another crate in the program may switch on serde_json's feature that keeps keys unsorted.
    value.sort_all_objects();
    // Numbers, strings and maps with string keys always serialize, and a Vec takes everything.
    let mut bytes = serde_json::to_vec_pretty(&value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// The content of a file that is spelled, and has a checksum, as a manifest. `value` is an object.
pub(super) fn signed(mut value: Value) -> Vec<u8> {
    let checksum = checksum(&value);
    value["checksum"] = Value::String(checksum);
    spell(&value)
}

/// The object that such a file holds, without the checksum; `None` where any byte is another.
pub(super) fn unsigned(bytes: &[u8]) -> Option<Value> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    let spelled = spell(&value) == bytes;
    let stated = value.as_object_mut()?.remove("checksum");
    (spelled && stated == Some(Value::String(checksum(&value)))).then_some(value)
}

/// Reads a whole file, unless it is longer than `limit` or not a file at all.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ManifestError> {
    let opened = open_regular(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ManifestError::Missing,
        _ => ManifestError::Read(error),
    })?;
    let (file, _) = opened.ok_or(ManifestError::NotARegularFile)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(ManifestError::Read)?;
    if bytes.len() as u64 > limit { Err(ManifestError::TooLong) } else { Ok(bytes) }
}

#[cfg(test)]
pub(crate) mod tests;
