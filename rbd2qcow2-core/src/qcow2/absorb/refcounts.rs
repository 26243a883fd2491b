//! The end: what is in use is counted, and what is not is given back.

use std::ops::Range;

use super::usage::{self, Usage};
use super::{Absorb, AbsorbError, WINDOW_CLUSTERS, index, per_block};
use crate::qcow2::check::source::Source;
use crate::qcow2::layer::LayerReader;
use crate::qcow2::refcount::RefcountEntry;
use crate::qcow2::table::HostOffset;

impl Absorb<'_> {
    /// Counts the refcounts, gives back the room of all that is no longer in use, and brings everything to
    /// stable storage. `now` reads the file as it is. Whoever has opened the file before the
    /// [`switch`](Self::switch) must be gone.
    ///
    /// # Errors
    /// [`AbsorbError`].
    pub(crate) fn finish(mut self, now: &LayerReader) -> Result<(), AbsorbError> {
        self.sync()?;
        // The old one goes first: there is memory for one.
        self.usage = Usage::default();
        self.usage = Usage::of(now, self.cancel)?;
        let blocks = self.refcount_blocks(now)?;
        self.count(now, &blocks)?;
        self.sync()?;
        let bits = now.geometry().cluster_bits;
        let end = self.usage.end();
        for run in self.usage.free_runs(end) {
            self.changed("give back room of", self.medium.discard(run.start << bits..run.end << bits))?;
        }
        self.changed("cut off the end of", self.medium.set_length(end << bits))?;
        self.sync()
    }

    /// Where all refcount blocks lie, and whether each is new: there is one for every cluster that is used.
    fn refcount_blocks(&mut self, now: &LayerReader) -> Result<Vec<(Option<HostOffset>, bool)>, AbsorbError> {
        let mut blocks = Vec::new();
        let table = now.header().refcount_table;
        let source = Source { layer: now, cancel: self.cancel };
        let mut fault = None;
        source.numbers(table.offset, table.entries, |_, raw| {
            match RefcountEntry::new(raw, now.geometry()) {
                Ok(entry) => blocks.push((entry.block, false)),
                Err(_) => fault = Some("its refcount table is damaged"),
            }
            Ok(())
        })?;
        if let Some(reason) = fault {
            return Err(AbsorbError::Unfit { path: now.path().to_owned(), reason });
        }
        // New blocks may lie behind the end, and want to be counted, too.
        let mut number = 0;
        while number < self.usage.end().div_ceil(per_block(now)) {
            let Some(block) = blocks.get_mut(index(number)) else {
                let reason = "its refcount table is too short";
                return Err(AbsorbError::Unfit { path: now.path().to_owned(), reason });
            };
            if block.0.is_none() {
                let host = HostOffset(self.usage.take(1) << now.geometry().cluster_bits);
                *block = (Some(host), true);
            }
            number += 1;
        }
        Ok(blocks)
    }

    /// Writes all refcounts, and the entries that lead to new blocks.
    fn count(&self, now: &LayerReader, blocks: &[(Option<HostOffset>, bool)]) -> Result<(), AbsorbError> {
        let (per_block, bits) = (per_block(now), now.geometry().cluster_bits);
        let at_once = (WINDOW_CLUSTERS / per_block).max(1);
        let new = blocks.iter().filter(|(_, new)| *new).filter_map(|(host, _)| *host);
        let new: Vec<_> = new.map(|host| host.0 >> bits).collect();
        for (number, blocks) in (0..).step_by(index(at_once)).zip(blocks.chunks(index(at_once))) {
            if blocks.iter().all(|(host, _)| host.is_none()) {
                continue;
            }
            let window = number * per_block..(number + blocks.len() as u64) * per_block;
            let mut counts = vec![0_u16; index(window.end - window.start)];
            let mut add = |clusters: Range<u64>| {
                for cluster in clusters.start.max(window.start)..clusters.end.min(window.end) {
                    let count = &mut counts[index(cluster - window.start)];
                    *count = count.saturating_add(1);
                }
            };
            usage::visit(now, self.cancel, |clusters, _| add(clusters))?;
            new.iter().for_each(|cluster| add(*cluster..cluster + 1));
            for ((host, _), counts) in blocks.iter().zip(counts.chunks(index(per_block))) {
                if let Some(host) = host {
                    let bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_be_bytes()).collect();
                    self.write(*host, &bytes)?;
                }
            }
        }
        let table = now.header().refcount_table.offset;
        for (number, (host, new)) in (0..).zip(blocks) {
            if let (Some(host), true) = (host, new) {
                self.write(HostOffset(table + number * 8), &host.0.to_be_bytes())?;
            }
        }
        Ok(())
    }
}
