//! Reading one layer: which parts of the guest's image it holds, and what is in them.

use std::fmt;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::compressed::unpack;
use super::error::ReadError;
use super::file::{ReadAt, ReadOnce};
use super::header::{Header, HeaderError};
use super::on_demand::{OnDemand, OpenFiles, Replaced};
use super::open_regular;
use super::pages::{LAYER_BYTES, LayerPages, Page, PageCache};
use super::table::{CompressedCluster, Geometry, GuestOffset, HostOffset, L2Entry};

mod segments;

use segments::{Held, Segments};

/// What a layer says of a range of the guest's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Data, as they are.
    Data,
    /// Zeroes, whatever the layers below hold.
    Zero,
    /// Compressed data.
    Compressed,
    /// Nothing: the layers below are to be asked.
    Absent,
}

/// One qcow2 file, open for reading. Never reads its backing file.
///
/// Can be shared by threads, which read in parallel. Holds at most 4 MiB of the file's tables (the layers of a
/// [chain](super::chain::ChainReader) share 32 MiB), and one more page of 16 KiB for each iterator; a read of
/// compressed data takes three clusters and the decoder's state meanwhile.
///
/// Nothing in the file is believed: an entry is checked before it is followed. What leads to a place
/// outside the file, into the header, or is set where the format reserves it, is an error that
/// names the place. That is checked of each entry on its own, and of those alone that a read needs.
/// What is told only by all of them together is left to [`check`](super::check::check): whether two
/// lead to the same place, and whether the refcounts, which are not read here, agree with them.
pub struct LayerReader {
    path: PathBuf,
    file: Box<dyn ReadAt>,
    header: Header,
    geometry: Geometry,
    pages: LayerPages,
}

impl fmt::Debug for LayerReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerReader").field("path", &self.path).field("header", &self.header).finish()
    }
}

impl LayerReader {
    /// Opens the file at `path`, which must be a regular file and no symbolic link, and reads its
    /// header.
    ///
    /// # Errors
    /// [`ReadError::Header`], as in [`from_source`](Self::from_source).
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        Self::open_as(path, |file, _| Ok(Box::new(file)))
    }

    /// The same, for data that are read once: long reads into page-aligned memory go past the page cache
    /// where the file system allows that.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_to_read_once(path: &Path) -> Result<Self, ReadError> {
        Self::open_as(path, |file, _| Ok(Box::new(ReadOnce::new(file, path)?)))
    }

    /// The same as either, `once` telling which, for a file that is number `number` of those that share the room
    /// for open files: it may be closed and opened again between reads.
    ///
    /// # Errors
    /// As [`open`](Self::open). Of reads also [`ReadError::Replaced`].
    pub(super) fn open_on_demand(
        path: &Path,
        once: bool,
        number: usize,
        files: &Arc<OpenFiles>,
    ) -> Result<Self, ReadError> {
        Self::open_as(path, |file, metadata| {
            Ok(Box::new(OnDemand::new(file, metadata, path, once, number, files.clone())))
        })
    }

    fn open_as(
        path: &Path,
        reader: impl FnOnce(File, &Metadata) -> std::io::Result<Box<dyn ReadAt>>,
    ) -> Result<Self, ReadError> {
        let failed = |cause| ReadError::Header { path: path.to_owned(), cause };
        let (file, metadata) = open_regular(path)
            .map_err(|error| failed(HeaderError::Read(error)))?
            .ok_or_else(|| failed(HeaderError::NotARegularFile))?;
        let header = Header::read_from(&file, metadata.len()).map_err(failed)?;
        let file = reader(file, &metadata).map_err(|error| failed(HeaderError::Read(error)))?;
        Self::new(path, file, header, metadata.len())
    }

    /// Takes what `source` holds, `source_bytes` bytes, for a layer; `path` is what errors call it.
    /// Reads the header.
    ///
    /// # Errors
    /// [`ReadError::Header`] when the header is invalid or says that the file is dirty, corrupt,
    /// encrypted, has its data elsewhere, or has internal snapshots. Dirty files are refused, though
    /// their mapping is right, and so are those with snapshots: no layer of a chain is either unless
    /// something other than a backup wrote to it, and that cannot be told from what the backup
    /// wrote.
    pub fn from_source(
        path: &Path,
        source: impl ReadAt + 'static,
        source_bytes: u64,
    ) -> Result<Self, ReadError> {
        let failed = |cause| ReadError::Header { path: path.to_owned(), cause };
        let header = Header::read_from(Sequential { source: &source, next: 0 }, source_bytes);
        Self::new(path, Box::new(source), header.map_err(failed)?, source_bytes)
    }

    fn new(path: &Path, file: Box<dyn ReadAt>, header: Header, file_bytes: u64) -> Result<Self, ReadError> {
        let fit = match header.snapshots {
            0 => header.check_restore_point(),
            _ => Err(HeaderError::Unfit { reason: "it has internal snapshots" }),
        };
        fit.map_err(|cause| ReadError::Header { path: path.to_owned(), cause })?;
        let geometry = Geometry::new(&header, file_bytes);
        let pages = LayerPages::new(geometry.cluster_size(), 0, Arc::new(PageCache::new(LAYER_BYTES)));
        Ok(Self { path: path.to_owned(), file, header, geometry, pages })
    }

    /// Keeps pages of tables in a cache that other layers use, too: this one is number `layer` there.
    pub(super) fn share_pages(&mut self, layer: usize, cache: Arc<PageCache>) {
        self.pages.share(layer, cache);
    }

    #[cfg(test)]
    pub(super) fn pages(&self) -> &LayerPages {
        &self.pages
    }

    /// The file's header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the file is called in errors: the path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of the image as the guest sees it, in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.header.virtual_size
    }

    /// How much of the guest's image an L2 table describes, in bytes.
    #[must_use]
    pub fn table_coverage(&self) -> u64 {
        self.geometry.l2_coverage()
    }

    /// Tells what of `range`, in bytes of the guest's image, this layer holds: ascending, gapless,
    /// no two neighbours alike. Reads tables only, and blocks for that. After an error the iterator
    /// is at its end.
    ///
    /// # Errors
    /// [`ReadError::OutOfRange`]. Of the items: [`ReadError::Io`], [`ReadError::Shrunk`],
    /// [`ReadError::L1Entry`], [`ReadError::L2Entry`].
    pub fn map(&self, range: Range<u64>) -> Result<Pieces<'_>, ReadError> {
        Ok(Pieces { segments: self.segments(range)?, pending: None, failed: false })
    }

    /// Fills `buf` with what this layer holds of the guest's image from `offset`, in bytes, on.
    /// Returns the ranges of the image that it does not hold, ascending and disjoint: those bytes of
    /// `buf` are left as they were.
    ///
    /// Unpacks whole clusters, so compressed ones are best read whole. Bytes of a data cluster that
    /// lie behind the file's end are zeroes, as in QEMU, where writers leave the file's last cluster
    /// unfinished.
    ///
    /// # Errors
    /// Those of [`map`](Self::map), and [`ReadError::Compressed`]. `buf` holds anything then.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<Vec<Range<u64>>, ReadError> {
        self.read_with(&mut Unpacked::default(), offset, buf)
    }

    /// The same, for one of several reads that may lie in the same cluster: it is unpacked once.
    pub(super) fn read_with(
        &self,
        unpacked: &mut Unpacked,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Vec<Range<u64>>, ReadError> {
        let mut absent: Vec<Range<u64>> = Vec::new();
        let end = offset.saturating_add(buf.len() as u64);
        for segment in self.segments(offset..end)? {
            let (range, held) = segment?;
            let target = &mut buf[index(range.start - offset)..index(range.end - offset)];
            match held {
                Held::Data(host) => self.read_data(host, target)?,
                Held::Zero => target.fill(0),
                Held::Compressed(cluster) => self.read_compressed(cluster, range.start, target, unpacked)?,
                Held::Absent => match absent.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => absent.push(range),
                },
            }
        }
        Ok(absent)
    }

    fn segments(&self, range: Range<u64>) -> Result<Segments<'_>, ReadError> {
        if range.start > range.end || range.end > self.virtual_size() {
            return Err(ReadError::OutOfRange {
                offset: GuestOffset(range.start),
                length: range.end.saturating_sub(range.start),
                virtual_size: self.virtual_size(),
            });
        }
        Ok(Segments::new(self, range))
    }

    fn read_data(&self, host: HostOffset, target: &mut [u8]) -> Result<(), ReadError> {
        let in_file = self.geometry.file_bytes.saturating_sub(host.0).min(target.len() as u64);
        let (from_file, behind) = target.split_at_mut(index(in_file));
        self.read_exact(host, from_file)?;
        behind.fill(0);
        Ok(())
    }

    fn read_compressed(
        &self,
        packed: CompressedCluster,
        from: u64,
        to: &mut [u8],
        unpacked: &mut Unpacked,
    ) -> Result<(), ReadError> {
        let cluster_size = self.geometry.cluster_size();
        let start = from - from % cluster_size;
        let unpack_to = |target: &mut [u8]| {
            let input = self.read_input(packed)?;
            unpack(self.geometry.compression_type, &input, target).map_err(|cause| ReadError::Compressed {
                path: self.path.clone(),
                guest: GuestOffset(start),
                host: packed.host,
                cause,
            })
        };
        if to.len() as u64 == cluster_size {
            return unpack_to(to);
        }
        let cluster = unpacked.get(start, index(cluster_size), unpack_to)?;
        let skipped = index(from - start);
        to.copy_from_slice(&cluster[skipped..skipped + to.len()]);
        Ok(())
    }

    /// The packed data of the cluster that holds the byte `offset` of the guest's image, with whatever
    /// follows them up to the end of the space that the file's tables tell: up to two clusters. `None`
    /// where that cluster is not compressed.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at), but that they are not unpacked.
    pub(crate) fn read_packed(&self, offset: u64) -> Result<Option<Vec<u8>>, ReadError> {
        match self.segments(offset..offset.saturating_add(1))?.next().transpose()? {
            Some((_, Held::Compressed(packed))) => self.read_input(packed).map(Some),
            _ => Ok(None),
        }
    }

    fn read_input(&self, packed: CompressedCluster) -> Result<Vec<u8>, ReadError> {
        let mut input = vec![0; index(packed.bytes)];
        self.read_exact(packed.host, &mut input)?;
        Ok(input)
    }

    /// What gives the file's entries their meaning.
    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Reads what was within the file when it was opened.
    pub(super) fn read_exact(&self, host: HostOffset, target: &mut [u8]) -> Result<(), ReadError> {
        let count = self.file.read_at(target, host.0).map_err(|cause| self.io(host, cause))?;
        if count < target.len() { Err(self.shrunk(HostOffset(host.0 + count as u64))) } else { Ok(()) }
    }

    fn page(&self, host: HostOffset) -> Result<Page, ReadError> {
        self.pages.page(&*self.file, host).map_err(|cause| self.io(host, cause))
    }

    fn io(&self, host: HostOffset, cause: std::io::Error) -> ReadError {
        let path = self.path.clone();
        match cause.get_ref().is_some_and(|cause| cause.is::<Replaced>()) {
            true => ReadError::Replaced { path },
            false => ReadError::Io { path, host, cause },
        }
    }

    fn shrunk(&self, host: HostOffset) -> ReadError {
        ReadError::Shrunk { path: self.path.clone(), host }
    }
}

/// The cluster of one layer of which a part was read last, whole. Newer layers leave many parts of a cluster
/// open, each of which is read on its own.
#[derive(Debug, Default)]
pub(super) struct Unpacked {
    /// Where the guest sees the cluster that `bytes` holds.
    start: Option<u64>,
    bytes: Vec<u8>,
}

impl Unpacked {
    /// The cluster at `start`, for which `unpack` fills that many bytes unless it is there.
    fn get(
        &mut self,
        start: u64,
        cluster_size: usize,
        unpack: impl FnOnce(&mut [u8]) -> Result<(), ReadError>,
    ) -> Result<&[u8], ReadError> {
        if self.start != Some(start) {
            // Not to be taken for the old one, should this fail.
            self.start = None;
            self.bytes.resize(cluster_size, 0);
            unpack(&mut self.bytes)?;
            self.start = Some(start);
        }
        Ok(&self.bytes)
    }
}

/// Offsets within a buffer or two clusters, which are in memory.
fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("within a buffer")
}

/// Reads a source from its start.
struct Sequential<'a, R> {
    source: &'a R,
    next: u64,
}

impl<R: ReadAt> std::io::Read for Sequential<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let count = self.source.read_at(buf, self.next)?;
        self.next += count as u64;
        Ok(count)
    }
}

/// What a layer holds of a range, from [`LayerReader::map`].
#[derive(Debug)]
pub struct Pieces<'a> {
    segments: Segments<'a>,
    /// What was seen last, and may go on.
    pending: Option<(Range<u64>, Piece)>,
    failed: bool,
}

impl Pieces<'_> {
    /// Gives back the page of a table that it holds. The cache has it, or it is read again.
    pub(super) fn release_page(&mut self) {
        self.segments.release_page();
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<(Range<u64>, Piece), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed {
            let (range, held) = match self.segments.next() {
                Some(Ok(segment)) => segment,
                Some(Err(error)) => {
                    self.failed = true;
                    return Some(Err(error));
                }
                None => break,
            };
            let piece = held.piece();
            match &mut self.pending {
                Some((last, kind)) if *kind == piece => last.end = range.end,
                pending => {
                    if let Some(done) = pending.replace((range, piece)) {
                        return Some(Ok(done));
                    }
                }
            }
        }
        // What came before an error is not told: it may be one piece with what cannot be read.
        if self.failed { None } else { self.pending.take().map(Ok) }
    }
}

#[cfg(test)]
mod tests;
