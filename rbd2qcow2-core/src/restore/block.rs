//! Bringing a block image to what a point is.
//!
//! Of an image that is all zeroes, everything that the point has data for is written. One that holds
//! something is compared with the point, and only what differs is written, in two passes: first what it
//! holds where the point has nothing is made zeroes, then the point's data are held against the image's.

use super::{LEAST_MEMORY, Restore, RestoreError, RestoreReport, Run};
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::compare::{Comparison, GRAIN};
use crate::copy::{self, Copy, CopyError};
use crate::layer::LayerError;
use crate::layer::block::{BlockImage, BlockLayer, Task};
use crate::point::OpenPoint;
use crate::progress::{Observer, Progress, Stage};
use crate::source::beyond::Beyond;
use crate::source::chain::ChainSource;
use crate::source::{BoxError, RbdDiffSource};

/// The largest object that is looked at as a whole when it should be empty, in bytes. A part of the
/// memory, whatever that is.
const LARGEST_OBJECT: u64 = 8 << 20;

/// A block image that a point is restored to. Nobody else must write to it meanwhile.
#[derive(Clone, Copy)]
pub struct BlockTarget<'a> {
    /// What is written to.
    pub image: &'a dyn BlockImage,
    /// Its name, for errors.
    pub title: &'a str,
    /// Its size in bytes, at least the point's. What lies behind the point's end becomes zeroes.
    pub size: u64,
    /// Bytes of what the image's storage frees in one go (a power of two), or `None`.
    pub object_size: Option<u64>,
    /// What the image holds, compared with nothing, and of the same size; `None` for an image that is
    /// all zeroes. It is read while the image is written to, never where that has been written.
    pub contents: Option<&'a dyn RbdDiffSource>,
}

impl Restore {
    /// Makes a block image what the point is. Blocks until all is on stable storage there.
    ///
    /// # Errors
    /// [`RestoreError::Point`], [`RestoreError::BlockTooSmall`]; [`RestoreError::Block`] and
    /// [`RestoreError::Cancelled`]: what the image holds then is no image of anything. Restoring again,
    /// with the contents, finishes it.
    pub fn to_block(
        &self,
        target: &BlockTarget<'_>,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<RestoreReport, RestoreError> {
        let run = self.begin(observer, cancel);
        let point = run.open()?;
        if target.size < point.size() {
            let (title, size, needed) = (target.title.to_owned(), target.size, point.size());
            return Err(RestoreError::BlockTooSmall { title, size, needed });
        }
        if !point.check_tables(cancel)? {
            return Err(RestoreError::Cancelled);
        }
        run.to_block(&point, target, &cancel.part()).map_err(|cause| match cause {
            _ if cancel.is_set() => RestoreError::Cancelled,
            cause => RestoreError::Block { title: target.title.to_owned(), cause },
        })
    }
}

impl Run<'_> {
    /// Makes the image what the point is. `stop` is set when that fails.
    pub(super) fn to_block(
        &self,
        point: &OpenPoint,
        target: &BlockTarget<'_>,
        stop: &Cancel,
    ) -> Result<RestoreReport, BoxError> {
        let change = Change { run: self, point, target, stop };
        let Some(contents) = target.contents else {
            let written = change.fill()?;
            return Ok(self.report(point, written));
        };
        let emptied = change.empty(contents)?;
        let (written, zeroed) = change.mend(contents)?;
        let zero_bytes = emptied + zeroed;
        let unchanged = target.size.saturating_sub(written + zero_bytes);
        Ok(RestoreReport { zero_bytes, unchanged_bytes: Some(unchanged), ..self.report(point, written) })
    }
}

/// All that takes part.
struct Change<'a> {
    run: &'a Run<'a>,
    point: &'a OpenPoint,
    target: &'a BlockTarget<'a>,
    stop: &'a Cancel,
}

impl Change<'_> {
    /// Writes everything. Returns how many bytes that was.
    fn fill(&self) -> Result<u64, BoxError> {
        self.run.stage(Stage::Copy);
        let layer = self.layer(Task::Fill);
        let source = ChainSource::new(self.point.chain(), self.point.size());
        self.copy(&source, &layer, true, self.memory(), &self.run.progress)?;
        self.flush(&layer)?;
        Ok(layer.written.get())
    }

    /// Makes everything zeroes that the point has no data for. Returns how many bytes were not.
    fn empty(&self, contents: &dyn RbdDiffSource) -> Result<u64, BoxError> {
        self.run.stage(Stage::Empty);
        let beyond = Beyond { image: contents, chain: self.point.chain(), size: self.point.size() };
        let object = self.target.object_size.filter(|size| *size <= LARGEST_OBJECT);
        let layer = self.layer(Task::Empty { beyond: &beyond, object });
        // What is shown is how far the point's own data are.
        self.copy(&beyond, &layer, true, self.memory(), &Progress::default())?;
        Ok(layer.zeroed.get())
    }

    /// Writes what differs. Returns how many bytes were written, and how many were made zeroes.
    fn mend(&self, contents: &dyn RbdDiffSource) -> Result<(u64, u64), BoxError> {
        self.run.stage(Stage::Copy);
        let half = self.memory() / 2;
        let comparison =
            Comparison { image: contents, buffers: &BufferPool::new(half), stop: self.stop, grain: GRAIN };
        let layer = self.layer(Task::Mend(comparison));
        let source = ChainSource::new(self.point.chain(), self.point.size());
        self.copy(&source, &layer, false, half, &self.run.progress)?;
        // What was taken for right because of it may be wrong.
        contents.confirm()?;
        self.flush(&layer)?;
        Ok((layer.written.get(), layer.zeroed.get()))
    }

    fn layer<'a>(&'a self, task: Task<'a>) -> BlockLayer<'a> {
        BlockLayer::new(self.target.image, self.target.title, self.target.size, task)
    }

    fn memory(&self) -> usize {
        self.run.restore.options.memory.max(LEAST_MEMORY)
    }

    fn copy(
        &self,
        source: &dyn RbdDiffSource,
        layer: &BlockLayer<'_>,
        root: bool,
        memory: usize,
        progress: &Progress,
    ) -> Result<(), BoxError> {
        let copy = Copy {
            source,
            layer,
            root,
            digests: None,
            buffers: &BufferPool::new(memory),
            rate_limit: None,
            parallel: self.run.restore.options.parallel,
            progress,
            cancel: self.run.cancel,
            stop: self.stop,
        };
        copy.run().map(drop).map_err(|error| self.explain(error))
    }

    /// Brings all that was written to stable storage. Once, at the end: where librbd has a cache, whose
    /// configuration it may find in the image, it writes through until the first flush, and tells of
    /// each write that failed.
    fn flush(&self, layer: &BlockLayer<'_>) -> Result<(), BoxError> {
        copy::finish(layer, self.run.cancel).map_err(|error| self.explain(error))
    }

    fn explain(&self, error: CopyError) -> BoxError {
        match error {
            CopyError::Source(cause) => match self.point.explain(cause) {
                Ok(error) => error.into(),
                Err(error) => error.into(),
            },
            // It is no layer to whoever reads this.
            CopyError::Layer(LayerError::Write { cause, .. } | LayerError::Finish { cause, .. }) => cause,
            error => error.into(),
        }
    }
}

#[cfg(test)]
mod tests;
