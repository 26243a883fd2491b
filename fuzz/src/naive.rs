//! A second reader of qcow2 files, written from QEMU's `docs/interop/qcow2` alone.
//!
//! Slow and simple: every look-up starts at the L1 table, nothing is kept. It checks what the
//! specification says must hold, and tells apart what the reader under test refuses beyond that:
//!
//! - a cluster that begins behind the file's end ([`Refused::behind_end`]);
//! - an L2 table, a cluster or the first byte of compressed data within the header's cluster, the L1
//!   table or the refcount table ([`Refused::overlap`]);
//! - compressed data that go on behind the cluster, or have no end where the file has room for them
//!   ([`Fault::Refused`]);
//! - of headers, see [`Head::may_be_refused`].
//!
//! Three things that the specification leaves open or rules out are as in QEMU: bit 63 means nothing
//! where there is no offset and in compressed entries, and what a file lacks of its last cluster is
//! zeroes.

use rbd2qcow2_core::qcow2::header::HeaderError;

use crate::image::Image;

/// Why a place in the guest's image cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The specification is violated.
    Wrong(&'static str),
    /// It holds, but the reader under test asks for more.
    Refused,
    /// This reader cannot tell.
    Unknown,
}

/// What the header says.
#[derive(Clone, Debug)]
pub struct Head {
    pub version: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub refcount_offset: u64,
    pub refcount_clusters: u64,
    pub header_length: u64,
    pub backing_offset: u64,
    pub crypt_method: u32,
    pub snapshots: u32,
    /// Incompatible features.
    pub features: u64,
    pub zstd: bool,
}

/// What is found in the tables for one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Data, at this offset of the file: that of the cluster, from [`l2`](Head::l2).
    Data(u64),
    Zero,
    Absent,
    /// Where packed data begin, and how many bytes of the file may belong to them.
    Compressed(u64, u64),
}

/// What the specification allows, but the reader under test does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    pub behind_end: bool,
    pub overlap: bool,
}

impl Refused {
    pub fn any(self) -> bool {
        self.behind_end || self.overlap
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64, Fault> {
    let bytes = bytes.get(at..at + N).ok_or(Fault::Wrong("the header is cut off"))?;
    Ok(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The bits `from` to `to` of `raw`, both included, where they stand.
fn bits(raw: u64, from: u32, to: u32) -> u64 {
    raw & (u64::MAX >> (63 - to)) & (u64::MAX << from)
}

fn must(holds: bool, rule: &'static str) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault::Wrong(rule)) }
}

impl Head {
    /// Reads the header from `first`, the file's beginning. The file has `file_bytes`.
    pub fn parse(first: &[u8], file_bytes: u64) -> Result<Self, Fault> {
        must(first.starts_with(b"QFI\xfb"), "magic")?;
        let small = |at| number::<4>(first, at).map(|number| number as u32);
        let (version, cluster_bits) = (small(4)?, small(20)?);
        must(version == 2 || version == 3, "version")?;
        must((9..64).contains(&cluster_bits), "cluster_bits")?;
        let mut head = Self {
            version,
            cluster_bits,
            size: number::<8>(first, 24)?,
            l1_offset: number::<8>(first, 40)?,
            l1_entries: number::<4>(first, 36)?,
            refcount_offset: number::<8>(first, 48)?,
            refcount_clusters: number::<4>(first, 56)?,
            header_length: 72,
            backing_offset: number::<8>(first, 8)?,
            crypt_method: small(32)?,
            snapshots: small(60)?,
            features: 0,
            zstd: false,
        };
        number::<8>(first, 64)?;
        must(head.crypt_method <= 2, "crypt_method")?;
        if version == 3 {
            head.features = number::<8>(first, 72)?;
            must(head.features < 1 << 5, "unknown incompatible features")?;
            must(number::<4>(first, 96)? <= 6, "refcount_order")?;
            head.header_length = number::<4>(first, 100)?;
            must(head.header_length >= 104 && head.header_length.is_multiple_of(8), "header_length")?;
            must(head.header_length <= 1 << cluster_bits, "the header lies in the first cluster")?;
            let kind = if head.header_length > 104 { number::<1>(first, 104)? } else { 0 };
            must(kind <= 1, "compression_type")?;
            must((kind != 0) == (head.features & 8 != 0), "compression_type and its feature bit")?;
            head.zstd = kind == 1;
            must(!head.extended() || cluster_bits >= 14, "extended entries and cluster_bits")?;
        }
        if head.l1_entries > 0 {
            must(head.l1_offset.is_multiple_of(head.cluster()), "l1_table_offset")?;
            must(
                head.l1_offset.saturating_add(head.l1_entries * 8) <= file_bytes,
                "the L1 table is cut off",
            )?;
        }
        if head.refcount_clusters > 0 {
            must(head.refcount_offset.is_multiple_of(head.cluster()), "refcount_table_offset")?;
        }
        if head.backing_offset != 0 {
            must(number::<4>(first, 16)? <= 1023, "backing_file_size")?;
        }
        Ok(head)
    }

    /// Whether the reader under test may refuse this header, which the specification allows, with
    /// `error`.
    pub fn may_be_refused(&self, error: &HeaderError, file_bytes: u64) -> bool {
        let cluster = u128::from(self.cluster());
        let refcounts = u128::from(self.refcount_clusters) * cluster;
        match error {
            // No backup leaves such files behind, or they have their data elsewhere.
            HeaderError::Unfit { .. } => {
                self.features & 0b111 != 0 || self.crypt_method != 0 || self.snapshots != 0
            }
            // Limits of QEMU.
            HeaderError::Field { field: "cluster_bits", .. } => self.cluster_bits > 21,
            HeaderError::Field { field: "l1_size", .. } => self.l1_entries > 4 << 20,
            HeaderError::Field { field: "refcount_table_clusters", .. } => {
                refcounts == 0 || refcounts > 8 << 20
            }
            HeaderError::Field { field: "size", .. } => {
                let entries = cluster / u128::from(self.entry_bytes());
                u128::from(self.size) > u128::from(self.l1_entries) * entries * cluster
            }
            // Tables are not in the header, and within the file; those without entries are aligned, too.
            HeaderError::Field { field: "l1_table_offset", .. } => self.l1_offset == 0 || self.l1_entries == 0,
            HeaderError::Field { field: "refcount_table_offset", .. } => self.refcount_offset == 0,
            HeaderError::Truncated { what: "the refcount table", .. } => {
                u128::from(self.refcount_offset) + refcounts > u128::from(file_bytes)
            }
            // The backing file's name lies behind the header in the first cluster, and is text.
            HeaderError::Field { field: "backing_file_offset" | "backing_file_size", .. }
            | HeaderError::Truncated { what: "the backing file's name", .. } => self.backing_offset != 0,
            // This reader does not look at extensions, autoclear features, and the table of snapshots.
            HeaderError::Field { field: "extension length" | "extension type", .. }
            | HeaderError::Field { field: "autoclear_features" | "snapshots_offset", .. }
            | HeaderError::NotText(_) => true,
            _ => false,
        }
    }

    pub fn extended(&self) -> bool {
        self.features & 16 != 0
    }

    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// What one entry of an L2 table tells of, at the least, in bytes.
    pub fn unit(&self) -> u64 {
        if self.extended() { self.cluster() / 32 } else { self.cluster() }
    }

    fn entry_bytes(&self) -> u64 {
        if self.extended() { 16 } else { 8 }
    }

    /// What one L2 table tells of, in bytes.
    pub fn coverage(&self) -> u64 {
        self.cluster() / self.entry_bytes() * self.cluster()
    }

    fn place(&self, host: u64, bytes: u64, file_bytes: u64) -> Refused {
        let tables = [
            (0, self.cluster()),
            (self.l1_offset, self.l1_entries * 8),
            (self.refcount_offset, self.refcount_clusters * self.cluster()),
        ];
        let overlap = tables.iter().any(|&(start, length)| {
            // Apart unless the first byte of one lies within the other.
            (host >= start && host - start < length) || (start >= host && start - host < bytes && length > 0)
        });
        Refused { behind_end: host >= file_bytes, overlap }
    }

    /// Where the L2 table lies that the L1 entry `raw` names; `None` for none.
    pub fn l1(&self, raw: u64, file_bytes: u64) -> Result<(Option<u64>, Refused), Fault> {
        must(bits(raw, 0, 8) == 0 && bits(raw, 56, 62) == 0, "reserved bits of an L1 entry")?;
        let host = bits(raw, 9, 55);
        if host == 0 {
            return Ok((None, Refused::default()));
        }
        must(host.is_multiple_of(self.cluster()), "an L2 table begins with a cluster")?;
        must(host + self.cluster() <= file_bytes, "an L2 table takes a whole cluster")?;
        Ok((Some(host), self.place(host, self.cluster(), file_bytes)))
    }

    /// What the L2 entry `raw`, with `bitmap` if entries are extended, says of the cluster, or of its
    /// subcluster `index`.
    pub fn l2(&self, raw: u64, bitmap: u64, index: u32, file_bytes: u64) -> Result<(Cell, Refused), Fault> {
        if raw >> 62 & 1 == 1 {
            must(!self.extended() || bitmap == 0, "a compressed cluster has no subclusters")?;
            let x = 62 - (self.cluster_bits - 8);
            let host = bits(raw, 0, x - 1);
            must(host < 1 << 56, "reserved bits of a compressed offset")?;
            let sectors = bits(raw, x, 61) >> x;
            let end = ((host / 512 + 1 + sectors) * 512).min(file_bytes);
            let cell = Cell::Compressed(host, end.saturating_sub(host));
            return Ok((cell, self.place(host, 1, file_bytes)));
        }
        must(bits(raw, 1, 8) == 0 && bits(raw, 56, 61) == 0, "reserved bits of an L2 entry")?;
        let zero = raw & 1 == 1;
        must(!zero || (self.version == 3 && !self.extended()), "the zero bit is there")?;
        let host = bits(raw, 9, 55);
        let mut refused = Refused::default();
        if host != 0 {
            must(host.is_multiple_of(self.cluster()), "a cluster's place is aligned")?;
            refused = self.place(host, self.cluster(), file_bytes);
        }
        if self.extended() {
            let (allocated, zeroes) = (bits(bitmap, 0, 31), bits(bitmap, 32, 63) >> 32);
            must(allocated & zeroes == 0, "what is zero is not allocated")?;
            must(allocated == 0 || host != 0, "what is allocated has a place")?;
            let cell = match (allocated >> index & 1, zeroes >> index & 1) {
                (1, _) => Cell::Data(host),
                (_, 1) => Cell::Zero,
                _ => Cell::Absent,
            };
            return Ok((cell, refused));
        }
        let cell = match (zero, host) {
            (true, _) => Cell::Zero,
            (false, 0) => Cell::Absent,
            (false, _) => Cell::Data(host),
        };
        Ok((cell, refused))
    }
}

/// One file.
pub struct Naive {
    pub image: Image,
    pub head: Head,
}

impl Naive {
    pub fn open(image: Image) -> Result<Self, Fault> {
        // A header is not longer, and all else in the first cluster is left alone.
        let head = Head::parse(&image.bytes(0, 512), image.length)?;
        Ok(Self { image, head })
    }

    fn entry(&self, at: u64) -> Result<u64, Fault> {
        let bytes = self.image.bytes(at, 8);
        let bytes = bytes.as_slice().try_into().map_err(|_| Fault::Wrong("a table is cut off"))?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// What is at `guest`, and where that ends, or may end: [`Cell::Data`] names the place of that
    /// very byte.
    pub fn cell(&self, guest: u64) -> Result<(Cell, u64), Fault> {
        let head = &self.head;
        let cluster = guest / head.cluster();
        let entries = head.cluster() / head.entry_bytes();
        let end = (guest / head.unit() + 1) * head.unit();
        let (table, refused) =
            head.l1(self.entry(head.l1_offset + cluster / entries * 8)?, self.image.length)?;
        if refused.any() {
            return Err(Fault::Refused);
        }
        let Some(table) = table else {
            return Ok((Cell::Absent, end));
        };
        let at = table + cluster % entries * head.entry_bytes();
        let bitmap = if head.extended() { self.entry(at + 8)? } else { 0 };
        let index = (guest % head.cluster() / head.unit()) as u32;
        let (cell, refused) = head.l2(self.entry(at)?, bitmap, index, self.image.length)?;
        if refused.any() {
            return Err(Fault::Refused);
        }
        Ok(match cell {
            Cell::Data(host) => (Cell::Data(host + guest % head.cluster()), end),
            Cell::Compressed(..) => (cell, (cluster + 1) * head.cluster()),
            Cell::Zero | Cell::Absent => (cell, end),
        })
    }

    /// The bytes of `cell`, which was found at `guest`, and of which `count` are wanted.
    pub fn content(&self, cell: Cell, guest: u64, count: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = match cell {
            Cell::Zero | Cell::Absent => Vec::new(),
            Cell::Data(host) => self.image.bytes(host, count),
            Cell::Compressed(host, space) => {
                let packed = self.image.bytes(host, space as usize);
                let cluster = self.head.cluster();
                let unpack = if self.head.zstd { unpack_zstd } else { inflate };
                unpack(&packed, cluster as usize)?.split_off((guest % cluster) as usize)
            }
        };
        bytes.resize(count, 0);
        Ok(bytes)
    }
}

/// All at once, with room for one byte too many.
fn inflate(packed: &[u8], cluster: usize) -> Result<Vec<u8>, Fault> {
    let mut found = vec![0; cluster + 1];
    let mut stream = flate2::Decompress::new(false);
    let status = stream.decompress(packed, &mut found, flate2::FlushDecompress::Finish);
    match stream.total_out() as usize {
        count if count < cluster => Err(Fault::Wrong("less than a cluster")),
        count if count == cluster && matches!(status, Ok(flate2::Status::StreamEnd)) => {
            found.truncate(cluster);
            Ok(found)
        }
        _ => Err(Fault::Refused),
    }
}

/// As a stream, which is how QEMU does it.
fn unpack_zstd(packed: &[u8], cluster: usize) -> Result<Vec<u8>, Fault> {
    use zstd::stream::raw::{DParameter, Decoder, Operation};
    // A stream's decoder allocates what the frame asks for. QEMU's refuses more than 2^27.
    const WINDOW_BITS: u32 = 22;
    let mut decoder = Decoder::new().expect("memory");
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_BITS)).expect("a valid limit");
    let mut found = vec![0; cluster + 1];
    let (mut used, mut filled) = (0, 0);
    loop {
        // Not a byte more than the cluster until that is full: an end there is the end.
        let room = if filled < cluster { cluster } else { cluster + 1 };
        let status = match decoder.run_on_buffers(&packed[used..], &mut found[filled..room]) {
            Ok(status) => status,
            Err(error) if error.to_string().contains("too much memory") => return Err(Fault::Unknown),
            Err(_) => return Err(Fault::Wrong("damaged data")),
        };
        used += status.bytes_read;
        filled += status.bytes_written;
        if filled > cluster {
            return Err(Fault::Refused);
        }
        if filled == cluster && status.remaining == 0 {
            found.truncate(cluster);
            return Ok(found);
        }
        if status.bytes_read == 0 && status.bytes_written == 0 {
            return Err(if filled < cluster { Fault::Wrong("less than a cluster") } else { Fault::Refused });
        }
    }
}
