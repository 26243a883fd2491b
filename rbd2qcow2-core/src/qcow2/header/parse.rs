//! From bytes that nobody vouches for to a [`Header`].

use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::U32;

use super::{
    AUTOCLEAR_RAW_DATA, BACKING_FORMAT_MAX, BACKING_NAME_MAX, BITMAPS_LENGTH, Backing,
    COMPRESSION_TYPE_OFFSET, ClusterBits, CompressionType, EXTENDED_L2_MIN_BITS, Encryption, Header,
    HeaderError, L1_TABLE_MAX, LUKS, MAGIC, REFCOUNT_TABLE_MAX, RawV2, RawV3, Table, V2_LENGTH, V3_LENGTH,
    Version, extension, incompatible,
};

impl Header {
    /// Parses the header from `prefix`, the first bytes of a file of `file_bytes` bytes: the whole
    /// first cluster, or the whole file where that is shorter.
    ///
    /// # Errors
    /// Every [`HeaderError`] that is not about reading files or about the use as a restore point.
    pub fn parse(prefix: &[u8], file_bytes: u64) -> Result<Self, HeaderError> {
        let truncated = |needed| HeaderError::Truncated { what: "the header", needed, file_bytes };
        let (raw, _) = RawV2::read_from_prefix(prefix).map_err(|_| {
            if prefix.starts_with(&MAGIC.to_be_bytes()) {
                truncated(V2_LENGTH as u64)
            } else {
                HeaderError::NotQcow2
            }
        })?;
        if raw.magic != MAGIC {
            return Err(HeaderError::NotQcow2);
        }
        let version = match raw.version.get() {
            2 => Version::V2,
            3 => Version::V3,
            other => return Err(HeaderError::Version(other)),
        };
        let bits = raw.cluster_bits.get();
        let cluster_bits =
            ClusterBits::new(bits).ok_or(field("cluster_bits", bits, "9 to 21 (512 bytes to 2 MiB)"))?;
        let more = match version {
            Version::V2 => Features::of_v2(),
            Version::V3 => {
                let (raw, _) =
                    RawV3::read_from_prefix(&prefix[V2_LENGTH..]).map_err(|_| truncated(V3_LENGTH as u64))?;
                Features::validate(&raw, prefix, cluster_bits)?
            }
        };
        let snapshots_offset = raw.snapshots_offset.get();
        if !is_cluster(snapshots_offset, cluster_bits) {
            // Even where there are none, as in QEMU.
            return Err(field("snapshots_offset", snapshots_offset, "a multiple of the cluster size"));
        }
        let first_cluster =
            &prefix[..prefix.len().min(usize::try_from(cluster_bits.size()).unwrap_or(usize::MAX))];
        Ok(Self {
            version,
            cluster_bits,
            virtual_size: raw.size.get(),
            backing: backing(&raw, first_cluster, more.header_length, file_bytes)?,
            encryption: encryption(raw.crypt_method.get())?,
            l1_table: l1_table(&raw, cluster_bits, more.has(incompatible::EXTENDED_L2), file_bytes)?,
            refcount_table: refcount_table(&raw, cluster_bits, file_bytes)?,
            refcount_order: more.refcount_order,
            snapshots: raw.nb_snapshots.get(),
            dirty: more.has(incompatible::DIRTY),
            corrupt: more.has(incompatible::CORRUPT),
            external_data: more.has(incompatible::EXTERNAL_DATA),
            compression_type: more.compression_type,
            extended_l2: more.has(incompatible::EXTENDED_L2),
            compatible_features: more.compatible,
            autoclear_features: more.autoclear,
            header_length: more.header_length,
        })
    }
}

fn field(field: &'static str, value: impl Into<u64>, rule: &'static str) -> HeaderError {
    HeaderError::Field { field, value: value.into(), rule }
}

/// What version 3 adds, or what its absence means.
struct Features {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression_type: CompressionType,
}

impl Features {
    fn of_v2() -> Self {
        Self {
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: 72,
            compression_type: CompressionType::Zlib,
        }
    }

    fn validate(raw: &RawV3, prefix: &[u8], cluster_bits: ClusterBits) -> Result<Self, HeaderError> {
        let incompatible = raw.incompatible_features.get();
        let unknown = incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(HeaderError::UnknownFeatures { bits: unknown });
        }
        let autoclear = raw.autoclear_features.get();
        if autoclear & AUTOCLEAR_RAW_DATA != 0 && incompatible & incompatible::EXTERNAL_DATA == 0 {
            return Err(field("autoclear_features", autoclear, "no raw external data without such a file"));
        }
        if incompatible & incompatible::EXTENDED_L2 != 0 && cluster_bits.bits() < EXTENDED_L2_MIN_BITS {
            let rule = "subclusters need clusters of 16 KiB or more";
            return Err(field("cluster_bits", cluster_bits.bits(), rule));
        }
        let refcount_order = raw.refcount_order.get();
        if refcount_order > 6 {
            return Err(field("refcount_order", refcount_order, "at most 6"));
        }
        let header_length = raw.header_length.get();
        let length_fits = (V3_LENGTH as u64..=cluster_bits.size()).contains(&header_length.into());
        if !length_fits || !header_length.is_multiple_of(8) {
            return Err(field("header_length", header_length, "a multiple of 8, 104 to the cluster size"));
        }
        let stated = if header_length as usize > COMPRESSION_TYPE_OFFSET {
            *prefix.get(COMPRESSION_TYPE_OFFSET).ok_or(HeaderError::Truncated {
                what: "the header",
                needed: header_length.into(),
                file_bytes: prefix.len() as u64,
            })?
        } else {
            0
        };
        let compression_type = match (stated, incompatible & incompatible::COMPRESSION_TYPE != 0) {
            (0, false) => CompressionType::Zlib,
            (1, true) => CompressionType::Zstd,
            (0 | 1, _) => {
                return Err(field("compression_type", stated, "not 0 exactly when the feature bit is set"));
            }
            _ => return Err(field("compression_type", stated, "0 (zlib) or 1 (zstd)")),
        };
        Ok(Self {
            incompatible,
            compatible: raw.compatible_features.get(),
            autoclear,
            refcount_order,
            header_length,
            compression_type,
        })
    }

    fn has(&self, bit: u64) -> bool {
        self.incompatible & bit != 0
    }
}

fn encryption(method: u32) -> Result<Encryption, HeaderError> {
    match method {
        0 => Ok(Encryption::None),
        1 => Ok(Encryption::Aes),
        LUKS => Ok(Encryption::Luks),
        other => Err(field("crypt_method", other, "0 (none), 1 (AES) or 2 (LUKS)")),
    }
}

fn l1_table(
    raw: &RawV2,
    cluster_bits: ClusterBits,
    extended_l2: bool,
    file_bytes: u64,
) -> Result<Table, HeaderError> {
    let entries = u64::from(raw.l1_size.get());
    if entries * 8 > L1_TABLE_MAX {
        return Err(field("l1_size", entries, "at most 32 MiB of entries"));
    }
    let l2_entries = cluster_bits.size() / if extended_l2 { 16 } else { 8 };
    // Cannot overflow: the largest cluster times the most entries is 2^39.
    let covered_by_one = cluster_bits.size() * l2_entries;
    if raw.size.get().div_ceil(covered_by_one) > entries {
        return Err(field("size", raw.size.get(), "no more than the L1 table covers"));
    }
    let table = Table { offset: raw.l1_table_offset.get(), entries };
    check_table("the L1 table", "l1_table_offset", table, cluster_bits, file_bytes)?;
    Ok(table)
}

fn refcount_table(raw: &RawV2, cluster_bits: ClusterBits, file_bytes: u64) -> Result<Table, HeaderError> {
    let clusters = u64::from(raw.refcount_table_clusters.get());
    let bytes = clusters * cluster_bits.size();
    if clusters == 0 || bytes > REFCOUNT_TABLE_MAX {
        return Err(field("refcount_table_clusters", clusters, "at least 1 cluster, at most 8 MiB"));
    }
    let table = Table { offset: raw.refcount_table_offset.get(), entries: bytes / 8 };
    check_table("the refcount table", "refcount_table_offset", table, cluster_bits, file_bytes)?;
    Ok(table)
}

/// Whether a cluster can begin at `offset`: no file is longer than 2^63 - 1 bytes.
fn is_cluster(offset: u64, cluster_bits: ClusterBits) -> bool {
    offset.is_multiple_of(cluster_bits.size()) && offset.cast_signed() >= 0
}

/// Checks that `table` lies behind the header, at a cluster's start, and within the file.
fn check_table(
    what: &'static str,
    offset_field: &'static str,
    table: Table,
    cluster_bits: ClusterBits,
    file_bytes: u64,
) -> Result<(), HeaderError> {
    if table.entries == 0 && is_cluster(table.offset, cluster_bits) {
        return Ok(());
    }
    if table.entries == 0 || table.offset == 0 || !table.offset.is_multiple_of(cluster_bits.size()) {
        return Err(field(
            offset_field,
            table.offset,
            "a multiple of the cluster size, and behind the header",
        ));
    }
    // Entries were limited before, so only the offset can be out of all bounds.
    match table.offset.checked_add(table.entries * 8) {
        Some(needed) if needed <= file_bytes => Ok(()),
        needed => Err(HeaderError::Truncated { what, needed: needed.unwrap_or(u64::MAX), file_bytes }),
    }
}

/// Reads the backing file's name and, from the extensions, its format.
fn backing(
    raw: &RawV2,
    first_cluster: &[u8],
    header_length: u32,
    file_bytes: u64,
) -> Result<Option<Backing>, HeaderError> {
    let offset = raw.backing_file_offset.get();
    let length = raw.backing_file_size.get();
    if offset > 1 << raw.cluster_bits.get() {
        return Err(field("backing_file_offset", offset, "in the first cluster"));
    }
    // As in QEMU: extensions end at the offset, and without an offset or a length there is no backing
    // file. Fits in usize: it lies in the first cluster.
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let extensions_end = if offset == 0 { first_cluster.len() } else { start };
    let mut name = None;
    if offset != 0 && length != 0 {
        if length > BACKING_NAME_MAX {
            return Err(field("backing_file_size", length, "at most 1023"));
        }
        if offset < u64::from(header_length) {
            return Err(field("backing_file_offset", offset, "behind the header"));
        }
        let end = offset + u64::from(length);
        if end > 1 << raw.cluster_bits.get() {
            return Err(field("backing_file_size", length, "short enough for the first cluster"));
        }
        let what = "the backing file's name";
        let bytes = first_cluster.get(start..usize::try_from(end).unwrap_or(usize::MAX));
        let bytes = bytes.ok_or(HeaderError::Truncated { what, needed: end, file_bytes })?;
        name = Some(text(bytes, "backing file name")?);
    }
    let extensions = first_cluster.get(header_length as usize..extensions_end).unwrap_or_default();
    let format = backing_format(extensions, raw.crypt_method.get())?;
    Ok(name.map(|name| Backing { name, format }))
}

/// Walks the header extensions, as QEMU does, and returns what the one for the backing format says.
fn backing_format(mut rest: &[u8], crypt_method: u32) -> Result<Option<String>, HeaderError> {
    let mut format = None;
    while !rest.is_empty() {
        let cut_off = |length: u64| field("extension length", length, "short enough for the first cluster");
        let (kind, after) = U32::read_from_prefix(rest).map_err(|_| cut_off(0))?;
        let (length, after) = U32::read_from_prefix(after).map_err(|_| cut_off(0))?;
        let length = length.get();
        // Also that of the end's mark.
        let data = after.get(..length as usize).ok_or_else(|| cut_off(length.into()))?;
        match kind.get() {
            extension::END => break,
            extension::BACKING_FORMAT if length > BACKING_FORMAT_MAX => {
                return Err(field("extension length", length, "at most 15 for the backing format"));
            }
            extension::BACKING_FORMAT => format = Some(text(data, "backing format")?),
            extension::BITMAPS if length != BITMAPS_LENGTH => {
                return Err(field("extension length", length, "24 for bitmaps"));
            }
            extension::ENCRYPTION if crypt_method != LUKS => {
                return Err(field("extension type", kind.get(), "none of LUKS without that encryption"));
            }
            // All others may be ignored, says the format. (That there is an external data file is told
            // by an incompatible feature, too.)
            _ => {}
        }
        // Data are padded to 8 bytes; the padding of the last one may be missing.
        rest = after.get(data.len().next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(format)
}

fn text(bytes: &[u8], what: &'static str) -> Result<String, HeaderError> {
    let text = std::str::from_utf8(bytes).map_err(|_| HeaderError::NotText(what))?;
    if text.contains('\0') { Err(HeaderError::NotText(what)) } else { Ok(text.to_owned()) }
}
