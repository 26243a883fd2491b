//! A block image that exists, as a layer: it is written in place, and lies on nothing.

use std::ops::Range;
use std::path::PathBuf;

use bytes::Bytes;

use super::{LayerError, LayerWriter, Patch, SECTOR};
use crate::cancel::Cancel;
use crate::compare::{Comparison, GRAIN};
use crate::extent::{Extent, ExtentKind, align_down, align_up};
use crate::progress::Counter;
use crate::source::BoxError;
use crate::source::beyond::Beyond;

/// What is written in one go where data lie scattered, in bytes, as with raw files.
const UNIT: u64 = 64 << 10;

/// An image that can be written to. All methods are called from several threads at once, block until
/// the work is done, and give up soon after the run's stop flag is set.
pub trait BlockImage: Sync {
    /// Writes `data`, never empty, from `offset` on, in bytes.
    ///
    /// # Errors
    /// What the image says. The range then holds anything.
    fn write(&self, offset: u64, data: Bytes) -> Result<(), BoxError>;

    /// Makes `range`, in bytes and never empty, read as zeroes, and frees what it takes.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BoxError>;

    /// Brings all that was written to stable storage.
    ///
    /// # Errors
    /// What the image says. Nothing that was written is certain then.
    fn flush(&self) -> Result<(), BoxError>;
}

/// What is known of the image beforehand, and so, what is to be done with a patch.
pub(crate) enum Task<'a> {
    /// It is all zeroes: data are written.
    Fill,
    /// Nothing: only what differs from the patch is written, zeroes too.
    Mend(Comparison<'a>),
    /// It should be zeroes where patches have data: those are made zeroes.
    Empty {
        /// Where the patches come from.
        beyond: &'a Beyond<'a>,
        /// Bytes of an object, which is emptied as a whole where the point holds nothing of it; `None`
        /// where objects do not lie one after the other.
        object: Option<u64>,
    },
}

/// A [`LayerWriter`] that brings a [`BlockImage`] to what a point is.
pub(crate) struct BlockLayer<'a> {
    image: &'a dyn BlockImage,
    /// The image's name, for errors.
    title: PathBuf,
    /// The image's size in bytes.
    size: u64,
    task: Task<'a>,
    /// Bytes that were written.
    pub(crate) written: Counter,
    /// Bytes that were made zeroes.
    pub(crate) zeroed: Counter,
    aborted: Cancel,
}

/// [`LayerWriter::abort`] was called.
#[derive(Debug, thiserror::Error)]
#[error("the image is no longer written to")]
struct Aborted;

impl<'a> BlockLayer<'a> {
    /// Writes to `image`, of `size` bytes, which errors call `title`.
    pub(crate) fn new(image: &'a dyn BlockImage, title: &str, size: u64, task: Task<'a>) -> Self {
        Self {
            image,
            title: title.into(),
            size,
            task,
            written: Counter::default(),
            zeroed: Counter::default(),
            aborted: Cancel::new(),
        }
    }

    fn try_write(&self, patch: &Patch) -> Result<(), BoxError> {
        match &self.task {
            Task::Fill => self.apply(patch, &patch.pieces),
            Task::Mend(comparison) => match comparison.differences(patch)? {
                Some(differences) => self.apply(patch, &differences),
                None => Err(Aborted.into()),
            },
            Task::Empty { beyond, object } => self.empty(patch, beyond, *object),
        }
    }

    /// Writes parts of a patch.
    fn apply(&self, patch: &Patch, parts: &[Extent]) -> Result<(), BoxError> {
        // What the copy pads the last sector with is not the image's.
        let ours = |part: &Extent| Extent::new(part.offset..part.end().min(self.size), part.kind);
        for part in parts.iter().filter_map(ours) {
            match part.kind {
                ExtentKind::Data => {
                    self.check()?;
                    self.image.write(part.offset, patch.bytes(&part))?;
                    self.written.add(part.length);
                }
                ExtentKind::Zero => self.zero(part.range())?,
            }
        }
        Ok(())
    }

    /// Makes the data of a patch zeroes. All that an object has of them is in one patch, if objects
    /// count.
    fn empty(&self, patch: &Patch, beyond: &Beyond<'_>, object: Option<u64>) -> Result<(), BoxError> {
        let mut done = 0;
        for piece in patch.pieces.iter().filter(|piece| piece.kind == ExtentKind::Data) {
            let Some(rest) = Extent::new(piece.offset.max(done)..piece.end().min(self.size), piece.kind)
            else {
                continue;
            };
            let mut range = rest.range();
            if let Some(object) = object {
                let whole = align_down(range.start, object)..align_up(range.end, object).min(self.size);
                if beyond.is_empty(&whole)? {
                    range = whole;
                }
            }
            done = range.end;
            self.zero(range)?;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<(), BoxError> {
        self.check()?;
        let length = range.end - range.start;
        self.image.write_zeroes(range)?;
        self.zeroed.add(length);
        Ok(())
    }

    fn check(&self) -> Result<(), Aborted> {
        if self.aborted.is_set() { Err(Aborted) } else { Ok(()) }
    }
}

impl LayerWriter for BlockLayer<'_> {
    fn grain(&self) -> u64 {
        match self.task {
            // No grain is partly the chain's, whose clusters are whole sectors.
            Task::Empty { .. } => SECTOR,
            _ => GRAIN as u64,
        }
    }

    fn unit(&self) -> u64 {
        match self.task {
            Task::Empty { object: Some(object), .. } => object.max(UNIT),
            _ => UNIT,
        }
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        self.try_write(&patch).map_err(|cause| LayerError::Write { path: self.title.clone(), cause })?;
        Ok(patch.pieces)
    }

    fn abort(&self) {
        self.aborted.set();
    }

    fn finish(&self) -> Result<(), LayerError> {
        let flushed = self.check().map_err(BoxError::from).and_then(|()| self.image.flush());
        flushed.map_err(|cause| LayerError::Finish { path: self.title.clone(), cause })
    }
}
