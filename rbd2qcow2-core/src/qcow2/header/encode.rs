//! From a [`Header`] to the bytes of a file.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::{
    CompressionType, Encryption, Header, MAGIC, RawV2, RawV3, V3_LENGTH, Version, extension, incompatible,
};

/// Length of the header that ends before the compression type.
#[allow(clippy::cast_possible_truncation, reason = "104")]
const SHORTEST_LENGTH: u32 = V3_LENGTH as u32;

/// Length of the header with its compression type, and padding to 8 bytes.
const LENGTH_WITH_COMPRESSION_TYPE: u32 = 112;

impl Header {
    /// The header as it stands in a file: with extensions and the backing file's name, not padded.
    /// `None` when that does not fit the first cluster, or for what this program never writes:
    /// version 2, encryption and internal snapshots. `header_length` is not looked at.
    ///
    /// Its inverse is [`parse`](Self::parse).
    #[must_use]
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        if self.version != Version::V3 || self.encryption != Encryption::None || self.snapshots != 0 {
            return None;
        }
        let header_length = self.encoded_length();
        let mut extensions = Vec::new();
        let backing = self.backing.as_ref();
        if let Some(format) = backing.and_then(|backing| backing.format.as_deref()) {
            extend(&mut extensions, extension::BACKING_FORMAT, format.as_bytes())?;
        }
        extend(&mut extensions, extension::END, &[])?;
        let name = backing.map_or("", |backing| backing.name.as_str());
        let name_offset = u64::from(header_length) + extensions.len() as u64;
        let fixed = RawV2 {
            magic: U32::new(MAGIC),
            version: U32::new(3),
            backing_file_offset: U64::new(if name.is_empty() { 0 } else { name_offset }),
            backing_file_size: U32::new(u32::try_from(name.len()).ok()?),
            cluster_bits: U32::new(self.cluster_bits.bits()),
            size: U64::new(self.virtual_size),
            crypt_method: U32::new(0),
            l1_size: U32::new(u32::try_from(self.l1_table.entries).ok()?),
            l1_table_offset: U64::new(self.l1_table.offset),
            refcount_table_offset: U64::new(self.refcount_table.offset),
            refcount_table_clusters: U32::new(
                u32::try_from(self.refcount_table.entries * 8 / self.cluster_bits.size()).ok()?,
            ),
            nb_snapshots: U32::new(0),
            snapshots_offset: U64::new(0),
        };
        let more = RawV3 {
            incompatible_features: U64::new(self.incompatible_features()),
            compatible_features: U64::new(self.compatible_features),
            autoclear_features: U64::new(self.autoclear_features),
            refcount_order: U32::new(self.refcount_order),
            header_length: U32::new(header_length),
        };
        let mut bytes = [fixed.as_bytes(), more.as_bytes()].concat();
        if self.compression_type == CompressionType::Zstd {
            bytes.push(1);
        }
        bytes.resize(header_length as usize, 0);
        bytes.extend(extensions);
        bytes.extend(name.as_bytes());
        (bytes.len() as u64 <= self.cluster_bits.size()).then_some(bytes)
    }

    /// What [`to_bytes`](Self::to_bytes) makes of `header_length`: no longer than needed, for the
    /// sake of old readers.
    pub(super) fn encoded_length(&self) -> u32 {
        match self.compression_type {
            CompressionType::Zlib => SHORTEST_LENGTH,
            CompressionType::Zstd => LENGTH_WITH_COMPRESSION_TYPE,
        }
    }

    fn incompatible_features(&self) -> u64 {
        let features = [
            (self.dirty, incompatible::DIRTY),
            (self.corrupt, incompatible::CORRUPT),
            (self.external_data, incompatible::EXTERNAL_DATA),
            (self.compression_type != CompressionType::Zlib, incompatible::COMPRESSION_TYPE),
            (self.extended_l2, incompatible::EXTENDED_L2),
        ];
        features.into_iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
    }
}

/// Appends a header extension, padded to 8 bytes.
fn extend(extensions: &mut Vec<u8>, kind: u32, data: &[u8]) -> Option<()> {
    extensions.extend(kind.to_be_bytes());
    extensions.extend(u32::try_from(data.len()).ok()?.to_be_bytes());
    extensions.extend(data);
    extensions.resize(extensions.len().next_multiple_of(8), 0);
    Some(())
}
