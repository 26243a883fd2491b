//! What is known of a row of the file's clusters while they are checked.

use std::ops::Range;

/// How a cluster is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// By something that needs the cluster for itself.
    Alone,
    /// By compressed data, which share it with others of their kind.
    Compressed,
}

/// Set in what is kept of a cluster that something needs for itself.
const ALONE: u16 = 1 << 15;

/// The most uses that are counted, and what stands for any more. Not even two million bytes of one
/// value are packed into less than 70 by zstd, whose blocks have 128 KiB at most, so that more than
/// 30000 of them never share a cluster.
pub(super) const MOST_USES: u16 = ALONE - 1;

/// A row of clusters: how often each is used, and what of its refcount is needed along with that. 18
/// bits for each.
#[derive(Debug, Default)]
pub(super) struct Window {
    range: Range<u64>,
    /// [`ALONE`], and the number of uses.
    uses: Vec<u16>,
    /// Clusters whose refcount, as it stands in the file, is 1.
    single: Bits,
    /// Clusters whose refcount cannot be known.
    unknown: Bits,
}

impl Window {
    /// Begins anew with the clusters `range`, of which nothing is known.
    pub(super) fn reset(&mut self, range: Range<u64>) {
        let length = usize::try_from(range.end - range.start).expect("a window is in memory");
        self.uses.clear();
        self.uses.resize(length, 0);
        self.single.reset(length);
        self.unknown.reset(length);
        self.range = range;
    }

    /// The clusters, by number.
    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Counts `times` uses of `cluster`. Returns whether it may not be used so because of what was
    /// counted before.
    pub(super) fn add(&mut self, cluster: u64, how: Use, times: u64) -> bool {
        let index = self.index(cluster);
        let known = self.uses[index];
        let alone = if how == Use::Alone { ALONE } else { 0 };
        let count = u64::from(known & MOST_USES).saturating_add(times).min(MOST_USES.into());
        self.uses[index] = known & ALONE | alone | u16::try_from(count).unwrap_or(MOST_USES);
        known != 0 && (known | alone) & ALONE != 0
    }

    /// How often `cluster` is used, as far as was counted: at most [`MOST_USES`].
    pub(super) fn uses(&self, cluster: u64) -> u16 {
        self.uses[self.index(cluster)] & MOST_USES
    }

    pub(super) fn set_single(&mut self, cluster: u64) {
        self.single.set(self.index(cluster));
    }

    pub(super) fn set_unknown(&mut self, cluster: u64) {
        self.unknown.set(self.index(cluster));
    }

    /// Whether the refcount of `cluster` is 1; `None` when it is not known.
    pub(super) fn is_single(&self, cluster: u64) -> Option<bool> {
        let index = self.index(cluster);
        (!self.unknown.get(index)).then(|| self.single.get(index))
    }

    fn index(&self, cluster: u64) -> usize {
        debug_assert!(self.range.contains(&cluster));
        usize::try_from(cluster - self.range.start).expect("a window is in memory")
    }
}

/// A bit for each cluster.
#[derive(Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn reset(&mut self, length: usize) {
        self.0.clear();
        self.0.resize(length.div_ceil(64), 0);
    }

    fn set(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn get(&self, index: usize) -> bool {
        self.0[index / 64] & 1 << (index % 64) != 0
    }
}
