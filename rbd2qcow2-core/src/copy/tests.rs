#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;
use crate::source::memory::MemorySource;

/// A layer in memory that remembers which grains were written, and refuses to write one twice.
struct MemoryLayer {
    grain: u64,
    unit: u64,
    /// Wants whole units, and holds every other one that it gets data of as a whole.
    greedy: bool,
    /// Units that a call has touched.
    touched: Mutex<BTreeSet<u64>>,
    state: Mutex<Contents>,
    /// The write with this number fails.
    fail_write: Option<usize>,
    /// Calls block until the layer is aborted.
    stuck: bool,
    writes: AtomicUsize,
    aborted: Cancel,
}

#[derive(Default)]
struct Contents {
    bytes: Vec<u8>,
    /// One for each grain: whether it was written.
    held: Vec<bool>,
}

impl MemoryLayer {
    fn new(size: usize, grain: u64) -> Self {
        let size = size.next_multiple_of(512);
        let grains = size.div_ceil(grain as usize);
        let state = Contents { bytes: vec![0xEE; size], held: vec![false; grains] };
        Self {
            grain,
            unit: grain,
            greedy: false,
            touched: Mutex::default(),
            state: Mutex::new(state),
            fail_write: None,
            stuck: false,
            writes: AtomicUsize::new(0),
            aborted: Cancel::new(),
        }
    }

    fn store(&self, range: Range<u64>, fill: impl FnOnce(&mut [u8])) -> Result<(), LayerError> {
        let fail = || LayerError::Write { path: "memory".into(), cause: "a fault on demand".into() };
        if self.stuck {
            while !self.aborted.is_set() {
                std::thread::sleep(Cancel::POLL / 10);
            }
            return Err(fail());
        }
        if self.fail_write == Some(self.writes.fetch_add(1, Ordering::Relaxed)) {
            return Err(fail());
        }
        let mut state = self.state.lock().unwrap();
        let size = state.bytes.len() as u64;
        assert!(range.start.is_multiple_of(self.grain), "{range:?} does not start at a grain");
        assert!(
            range.end.is_multiple_of(self.grain) || range.end == size,
            "{range:?} does not end at a grain"
        );
        for grain in range.start / self.grain..range.end.div_ceil(self.grain) {
            let held = std::mem::replace(&mut state.held[grain as usize], true);
            assert!(!held, "grain {grain} was written twice");
        }
        fill(&mut state.bytes[range.start as usize..range.end as usize]);
        Ok(())
    }

    /// What a guest sees with `base` below.
    fn over(&self, base: Option<&[u8]>, size: usize) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let mut below = base.unwrap_or_default().to_vec();
        below.resize(state.bytes.len(), 0);
        for (index, held) in state.held.iter().enumerate() {
            if *held {
                let start = index * self.grain as usize;
                let end = (start + self.grain as usize).min(state.bytes.len());
                below[start..end].copy_from_slice(&state.bytes[start..end]);
            }
        }
        assert!(below[size..].iter().all(|byte| *byte == 0), "padding is not zero");
        below.truncate(size);
        below
    }
}

impl LayerWriter for MemoryLayer {
    fn grain(&self) -> u64 {
        self.grain
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn wants_whole_units(&self) -> bool {
        self.greedy
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        let size = self.state.lock().unwrap().bytes.len() as u64;
        let mut held: Vec<Extent> = Vec::new();
        let mut units = BTreeSet::new();
        for piece in &patch.pieces {
            assert!(held.last().is_none_or(|last| last.end() <= piece.offset), "pieces do not ascend");
            for unit in piece.offset / self.unit..piece.end().div_ceil(self.unit) {
                let whole = unit * self.unit..((unit + 1) * self.unit).min(size);
                let known = patch.offset..patch.offset + patch.data.len() as u64;
                let data = piece.kind == ExtentKind::Data;
                if data && self.greedy {
                    assert!(
                        known.start <= whole.start && known.end >= whole.end,
                        "a part of a unit is missing"
                    );
                }
                units.insert(unit);
            }
            if piece.kind == ExtentKind::Data {
                let bytes = patch.bytes(piece);
                assert!(bytes.chunks(self.grain as usize).all(|grain| !crate::extent::is_zero(grain)));
            }
            held.push(*piece);
        }
        for unit in &units {
            assert!(self.touched.lock().unwrap().insert(*unit), "unit {unit} came in two calls");
        }
        if self.greedy {
            for unit in units.into_iter().filter(|unit| unit % 2 == 1) {
                let whole = unit * self.unit..((unit + 1) * self.unit).min(size);
                let inside = |piece: &Extent| piece.offset < whole.end && whole.start < piece.end();
                if held.iter().any(|piece| inside(piece) && piece.kind == ExtentKind::Data) {
                    let mut kept: Vec<Extent> = Vec::new();
                    for piece in &held {
                        let parts = [
                            piece.offset..piece.end().min(whole.start),
                            piece.offset.max(whole.end)..piece.end(),
                        ];
                        kept.extend(parts.into_iter().filter_map(|part| Extent::new(part, piece.kind)));
                    }
                    kept.extend(Extent::new(whole, ExtentKind::Data));
                    kept.sort_by_key(|piece| piece.offset);
                    held = kept;
                }
            }
        }
        for piece in &held {
            match piece.kind {
                ExtentKind::Data => {
                    self.store(piece.range(), |bytes| bytes.copy_from_slice(&patch.bytes(piece)))?
                }
                ExtentKind::Zero => self.store(piece.range(), |bytes| bytes.fill(0))?,
            }
        }
        Ok(held)
    }

    fn abort(&self) {
        self.aborted.set();
    }

    fn finish(&self) -> Result<(), LayerError> {
        Ok(())
    }
}

fn copy(
    source: &MemorySource,
    layer: &MemoryLayer,
    cancel: &Cancel,
) -> (Result<Duration, CopyError>, Progress) {
    copy_until(source, source.base.is_none(), layer, cancel, &cancel.part())
}

/// Copies with a stop flag of the caller's.
fn copy_until(
    source: &dyn RbdDiffSource,
    root: bool,
    layer: &MemoryLayer,
    cancel: &Cancel,
    stop: &Cancel,
) -> (Result<Duration, CopyError>, Progress) {
    let progress = Progress::default();
    let result = Copy {
        source,
        layer,
        root,
        digests: None,
        buffers: &BufferPool::new(256 << 10),
        rate_limit: None,
        parallel: 4,
        progress: &progress,
        cancel,
        stop,
    }
    .run();
    (result, progress)
}

/// Bytes in runs, so that there are zeroes and equal stretches of any length.
fn content() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((0_u8..3, 1_usize..30_000), 0..30)
        .prop_map(|runs| runs.into_iter().flat_map(|(byte, length)| vec![byte; length]).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_layer_over_its_base_is_the_snapshot(
        content in content(), base in prop::option::of(content()), block in 1_usize..20_000, bits in 9_u32..17,
        unit in 0_u32..3, greedy in any::<bool>()
    ) {
        let source = MemorySource { content, base, block, ..MemorySource::default() };
        let unit = 1 << (bits + unit);
        let layer = MemoryLayer { unit, greedy, ..MemoryLayer::new(source.content.len(), 1 << bits) };
        let (result, progress) = copy(&source, &layer, &Cancel::new());
        prop_assert!(result.is_ok(), "{:?}", result);
        let size = source.content.len();
        prop_assert_eq!(progress.scanned.get(), size as u64);
        let seen = layer.over(source.base.as_deref(), size);
        prop_assert!(seen == source.content);
        if source.base.is_none() {
            prop_assert_eq!(progress.zero.get(), 0);
        }
    }
}

/// 1 MiB of data without zeroes.
fn full() -> MemorySource {
    MemorySource { content: vec![7; 1 << 20], block: 4096, ..MemorySource::default() }
}

#[test]
fn the_first_error_is_reported_and_everyone_stops() {
    let read = MemorySource { fail_read: Some(600_000), ..full() };
    let layer = MemoryLayer::new(1 << 20, 4096);
    let error = copy(&read, &layer, &Cancel::new()).0.unwrap_err();
    assert!(matches!(error, CopyError::Source(SourceError::Read { .. })), "{error}");

    let diff = MemorySource { fail_diff: Some(600_000), ..full() };
    let layer = MemoryLayer::new(1 << 20, 4096);
    let error = copy(&diff, &layer, &Cancel::new()).0.unwrap_err();
    assert!(matches!(error, CopyError::Source(SourceError::Diff { .. })), "{error}");

    let segments = MemorySource { fail_segments: Some(600_000), ..full() };
    let layer = MemoryLayer::new(1 << 20, 4096);
    let error = copy(&segments, &layer, &Cancel::new()).0.unwrap_err();
    assert!(matches!(error, CopyError::Source(SourceError::Segments { .. })), "{error}");

    let layer = MemoryLayer { fail_write: Some(3), ..MemoryLayer::new(1 << 20, 4096) };
    let error = copy(&full(), &layer, &Cancel::new()).0.unwrap_err();
    assert!(matches!(error, CopyError::Layer(LayerError::Write { .. })), "{error}");
}

#[test]
fn a_cancel_frees_threads_that_the_layer_holds() {
    let layer = MemoryLayer { stuck: true, ..MemoryLayer::new(1 << 20, 4096) };
    let cancel = Cancel::new();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| copy(&full(), &layer, &cancel).0);
        std::thread::sleep(Cancel::POLL);
        assert!(!run.is_finished());
        cancel.set();
        let error = run.join().unwrap().unwrap_err();
        assert!(matches!(error, CopyError::Cancelled), "{error}");
    });
}

/// Nothing is copied when the stop flag is set from outside, and that is no success.
#[test]
fn a_stop_that_nobody_explains_is_no_success() {
    let (source, layer, cancel) = (full(), MemoryLayer::new(1 << 20, 4096), Cancel::new());
    let stop = cancel.part();
    stop.set();
    let error = copy_until(&source, true, &layer, &cancel, &stop).0.unwrap_err();
    assert!(matches!(error, CopyError::Cancelled), "{error}");
}

/// Once the last sector of a shrunk image showed what the larger base held behind the new end.
#[test]
fn the_padding_hides_what_a_larger_base_held() {
    for (content, length) in [(vec![7; 5000], 9000), (vec![0; 5000], 5001), (vec![7; 5120], 9000)] {
        let mut base = content.clone();
        base.resize(length, 9);
        let source = MemorySource { content, base: Some(base), block: 1, ..MemorySource::default() };
        let layer = MemoryLayer::new(source.content.len(), 512);
        assert!(copy(&source, &layer, &Cancel::new()).0.is_ok());
        assert_eq!(layer.over(source.base.as_deref(), source.content.len()), source.content);
        // Without a broken sector nothing is held needlessly.
        let held = layer.state.lock().unwrap().held.iter().filter(|held| **held).count();
        assert_eq!(held, usize::from(!source.content.len().is_multiple_of(512)));
    }
}

/// A source of 1 MiB that gives the segments and the extents it is told to.
struct Defective {
    segments: Vec<Range<u64>>,
    extents: Vec<Extent>,
}

impl RbdDiffSource for Defective {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn segments(&self, _align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        Box::new(self.segments.iter().cloned().map(Ok))
    }

    fn diff(&self, _segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        found.extend(&self.extents);
        Ok(())
    }

    fn read(&self, _offset: u64, buffer: &mut crate::buffer::Buffer) -> Result<(), SourceError> {
        buffer.fill(7);
        Ok(())
    }
}

#[test]
fn a_source_that_breaks_its_promises_is_found_out() {
    let extent = |offset, length| Extent { offset, length, kind: ExtentKind::Data };
    let cases = [
        (vec![(4096, 8192), (0, 4096)], vec![]),
        (vec![(0, 8192), (4096, 8192)], vec![]),
        (vec![(4096, 4096)], vec![]),
        (vec![(0, 5000)], vec![]),
        (vec![(100, 4096)], vec![]),
        (vec![(0, (1 << 20) + 4096)], vec![]),
        (vec![(0, 4096)], vec![extent(4096, 10)]),
        (vec![(4096, 8192)], vec![extent(4095, 10)]),
        (vec![(0, 4096)], vec![extent(0, 0)]),
        (vec![(0, 4096)], vec![extent(10, u64::MAX)]),
    ];
    for (segments, extents) in cases {
        let what = format!("{segments:?} {extents:?}");
        let segments = segments.into_iter().map(|(start, end)| start..end).collect();
        let source = Defective { segments, extents };
        let (layer, cancel) = (MemoryLayer::new(1 << 20, 4096), Cancel::new());
        let result = copy_until(&source, true, &layer, &cancel, &cancel.part()).0;
        assert!(matches!(result, Err(CopyError::Defective { .. })), "{what}: {result:?}");
    }
}

#[test]
fn an_image_of_no_bytes_is_copied() {
    let source = MemorySource::default();
    let layer = MemoryLayer::new(0, 4096);
    let (result, progress) = copy(&source, &layer, &Cancel::new());
    assert!(result.is_ok());
    assert_eq!(progress.size.get(), 0);
}

#[test]
fn a_rate_limit_does_not_change_what_is_copied() {
    let limit = RateLimit::new(1 << 30);
    let layer = MemoryLayer::new(1 << 20, 4096);
    let (cancel, progress, buffers) = (Cancel::new(), Progress::default(), BufferPool::new(1 << 20));
    let source = full();
    let copy = Copy {
        source: &source,
        layer: &layer,
        root: true,
        digests: None,
        buffers: &buffers,
        rate_limit: Some(&limit),
        parallel: 1,
        progress: &progress,
        cancel: &cancel,
        stop: &cancel.part(),
    };
    copy.run().unwrap();
    assert!(layer.over(None, 1 << 20) == source.content);
}
