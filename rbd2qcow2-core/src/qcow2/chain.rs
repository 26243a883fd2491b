//! Reading a chain: one image from several layers, the newest first.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::error::ReadError;
use super::layer::{LayerReader, Piece, Pieces, Unpacked};
use super::on_demand::OpenFiles;
use super::pages::{CHAIN_BYTES, LAYER_BYTES, PageCache};
use super::table::GuestOffset;
use crate::files::{self, Shortage};

/// The layers of one restore point, open for reading. Can be shared by threads, which read in
/// parallel.
///
/// Of each layer what a read needs is checked as [`LayerReader`] tells, of the chain that its files
/// build upon each other as given. The structure of a layer as a whole is looked at by
/// [`check`](super::check::check), one layer at a time.
///
/// Takes at most 4 MiB for each layer's tables, and 32 MiB for those of all layers, however many there are; and
/// for each iterator, up to 1 MiB.
#[derive(Debug)]
pub struct ChainReader {
    /// The newest first; never empty.
    layers: Vec<LayerReader>,
}

/// How many layers an iterator holds a page of a table of.
const PAGES_HELD: usize = 64;

/// A range of the guest's image, and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainPiece {
    /// The range, in bytes.
    pub range: Range<u64>,
    /// What its owner says of it. [`Piece::Absent`] reads as zeroes.
    pub piece: Piece,
    /// Who: an index into [`ChainReader::layers`]. `None` where no layer holds anything, or where
    /// what older layers hold is hidden by a shorter one between.
    pub layer: Option<usize>,
}

impl ChainReader {
    /// Opens the files at `paths`, the newest first, as
    /// [`Catalogue::ancestry`](crate::chain::catalogue::Catalogue::ancestry) lists them. The first
    /// layer of a Python chain builds upon
    /// [`empty.qcow2`](crate::chain::catalogue::PYTHON_ROOT), which must then be the last of `paths`.
    ///
    /// Never opens a file by a name from a header: those names are only compared, and the chain is
    /// as long as `paths`, so no loop of backing files is followed.
    ///
    /// The files stay open. Of a chain for which this process may not have enough files open (half of what is
    /// left to it, but for a reserve), only those that were read last do. The others are opened again when they
    /// are read: one that is not the same file then is [`ReadError::Replaced`].
    ///
    /// # Errors
    /// [`ReadError::NoLayers`], [`ReadError::Header`] (also for a backing file that is not a qcow2
    /// file in the same directory), [`ReadError::Backing`] where a header names another file than
    /// the next of `paths`, or the last one names any.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self, ReadError> {
        Self::open_within(paths, false, files::room())
    }

    /// The same, for data that are read once: see [`LayerReader::open_to_read_once`].
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_to_read_once<P: AsRef<Path>>(paths: &[P]) -> Result<Self, ReadError> {
        Self::open_within(paths, true, files::room())
    }

    /// The same as either, `once` telling which: all layers stay open where `room` descriptors are enough for
    /// that, else those that were read last.
    fn open_within<P: AsRef<Path>>(paths: &[P], once: bool, room: usize) -> Result<Self, ReadError> {
        if paths.len().saturating_mul(if once { 2 } else { 1 }) <= room {
            let open = |path: &P| match once {
                true => LayerReader::open_to_read_once(path.as_ref()),
                false => LayerReader::open(path.as_ref()),
            };
            match paths.iter().map(open).collect() {
                // Somebody else has opened many files meanwhile.
                Err(error) if Shortage::of(&error).is_some() => {}
                layers => return Self::from_layers(layers?),
            }
        }
        let files = Arc::new(OpenFiles::new(room));
        let open =
            |(number, path): (usize, &P)| LayerReader::open_on_demand(path.as_ref(), once, number, &files);
        Self::from_layers(paths.iter().enumerate().map(open).collect::<Result<_, _>>()?)
    }

    /// Joins open layers, the newest first.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_layers(mut layers: Vec<LayerReader>) -> Result<Self, ReadError> {
        for (index, layer) in layers.iter().enumerate() {
            let named = layer.header().chain_backing();
            let named = named.map_err(|cause| ReadError::Header { path: layer.path().to_owned(), cause })?;
            let below = layers.get(index + 1);
            let given = below.map(|below| below.path().file_name().unwrap_or_default());
            if named.map(std::ffi::OsStr::new) != given {
                return Err(ReadError::Backing {
                    path: layer.path().to_owned(),
                    named: named.map(str::to_owned),
                    given: given.map(|name| name.to_string_lossy().into_owned()),
                });
            }
        }
        if layers.is_empty() {
            return Err(ReadError::NoLayers);
        }
        let cache = Arc::new(PageCache::new(CHAIN_BYTES.min(LAYER_BYTES * layers.len())));
        for (number, layer) in layers.iter_mut().enumerate() {
            layer.share_pages(number, cache.clone());
        }
        Ok(Self { layers })
    }

    /// The layers, the newest first.
    #[must_use]
    pub fn layers(&self) -> &[LayerReader] {
        &self.layers
    }

    /// The size of the image as the guest sees it, in bytes: the newest layer's.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.layers[0].virtual_size()
    }

    /// Fills `buf` with the guest's image from `offset`, in bytes, on. What no layer holds is
    /// zeroes. Blocks while it reads.
    ///
    /// A layer that is shorter than those above it reads as zeroes behind its end, and hides what
    /// older, longer layers hold there, as in QEMU: the image was shrunk and grown again.
    ///
    /// # Errors
    /// Those of [`LayerReader::read_at`]. `buf` holds anything then.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.check_range(&(offset..offset.saturating_add(buf.len() as u64)))?;
        let mut wanted = Vec::new();
        if !buf.is_empty() {
            wanted.push(offset..offset + buf.len() as u64);
        }
        let within = |range: &Range<u64>| in_memory(range.start - offset)..in_memory(range.end - offset);
        for layer in &self.layers {
            let (mut absent, mut unpacked) = (Vec::new(), Unpacked::default());
            for range in wanted {
                let (inside, behind) = split(range, layer.virtual_size());
                buf[within(&behind)].fill(0);
                if !inside.is_empty() {
                    let target = &mut buf[within(&inside)];
                    absent.append(&mut layer.read_with(&mut unpacked, inside.start, target)?);
                }
            }
            wanted = absent;
        }
        for range in wanted {
            buf[within(&range)].fill(0);
        }
        Ok(())
    }

    /// Tells who holds what of `range`, in bytes of the guest's image: ascending, gapless, no two
    /// neighbours alike. Reads tables only, and blocks for that. After an error the iterator is at
    /// its end.
    ///
    /// # Errors
    /// [`ReadError::OutOfRange`]. The items' are those of [`LayerReader::map`].
    pub fn map(&self, range: Range<u64>) -> Result<ChainPieces<'_>, ReadError> {
        self.check_range(&range)?;
        let sources = vec![Source::Layer(0, self.layers[0].map(range)?)];
        Ok(ChainPieces { chain: self, sources, pending: None })
    }

    fn check_range(&self, range: &Range<u64>) -> Result<(), ReadError> {
        if range.start > range.end || range.end > self.virtual_size() {
            return Err(ReadError::OutOfRange {
                offset: GuestOffset(range.start),
                length: range.end.saturating_sub(range.start),
                virtual_size: self.virtual_size(),
            });
        }
        Ok(())
    }
}

/// Splits `range` at `size` into what lies before, and what lies behind it.
fn split(range: Range<u64>, size: u64) -> (Range<u64>, Range<u64>) {
    let at = size.clamp(range.start, range.end);
    (range.start..at, at..range.end)
}

fn in_memory(offset: u64) -> usize {
    usize::try_from(offset).expect("within a buffer")
}

/// Where the next pieces come from.
#[derive(Debug)]
enum Source<'a> {
    /// A layer.
    Layer(usize, Pieces<'a>),
    /// Nobody: it lies behind a layer's end, or below the oldest.
    Nobody(Range<u64>),
}

/// Who holds what of a range, from [`ChainReader::map`].
#[derive(Debug)]
pub struct ChainPieces<'a> {
    chain: &'a ChainReader,
    /// The one at the end is asked first. At most two for each layer.
    sources: Vec<Source<'a>>,
    /// What was seen last, and may go on.
    pending: Option<ChainPiece>,
}

impl ChainPieces<'_> {
    /// The next piece, which may be like the one before.
    fn step(&mut self) -> Result<Option<ChainPiece>, ReadError> {
        while let Some(source) = self.sources.last_mut() {
            let (index, next) = match source {
                Source::Nobody(range) => {
                    let range = range.clone();
                    self.sources.pop();
                    return Ok(Some(ChainPiece { range, piece: Piece::Absent, layer: None }));
                }
                Source::Layer(index, pieces) => (*index, pieces.next().transpose()?),
            };
            match next {
                None => {
                    self.sources.pop();
                }
                Some((range, Piece::Absent)) => self.ask_below(index + 1, range)?,
                Some((range, piece)) => return Ok(Some(ChainPiece { range, piece, layer: Some(index) })),
            }
        }
        Ok(None)
    }

    /// Lets the layer `index` tell of `range` next.
    fn ask_below(&mut self, index: usize, range: Range<u64>) -> Result<(), ReadError> {
        // Of a long chain only the upper layers' pages stay at hand.
        if index > PAGES_HELD
            && let Some(Source::Layer(_, pieces)) = self.sources.last_mut()
        {
            pieces.release_page();
        }
        let Some(layer) = self.chain.layers.get(index) else {
            self.sources.push(Source::Nobody(range));
            return Ok(());
        };
        let (inside, behind) = split(range, layer.virtual_size());
        if !behind.is_empty() {
            self.sources.push(Source::Nobody(behind));
        }
        if !inside.is_empty() {
            self.sources.push(Source::Layer(index, layer.map(inside)?));
        }
        Ok(())
    }
}

impl Iterator for ChainPieces<'_> {
    type Item = Result<ChainPiece, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let found = match self.step() {
                Ok(Some(found)) => found,
                Ok(None) => return self.pending.take().map(Ok),
                Err(error) => {
                    // What came before is not told: it may be one piece with what cannot be read.
                    self.sources.clear();
                    self.pending = None;
                    return Some(Err(error));
                }
            };
            match &mut self.pending {
                Some(last) if last.piece == found.piece && last.layer == found.layer => {
                    last.range.end = found.range.end;
                }
                pending => {
                    if let Some(done) = pending.replace(found) {
                        return Some(Ok(done));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
