//! Has the reader under test and the naive one read the same, and insists that they agree: on what is
//! there, on the bytes, and on what cannot be read.

use std::ops::Range;
use std::path::Path;

use rbd2qcow2_core::qcow2::chain::ChainReader;
use rbd2qcow2_core::qcow2::error::ReadError;
use rbd2qcow2_core::qcow2::header::{CompressionType, Version};
use rbd2qcow2_core::qcow2::layer::{LayerReader, Piece};

use crate::image::Image;
use crate::naive::{Cell, Fault, Naive};

/// What is read at the image's beginning, in bytes; less elsewhere.
const FIRST: u64 = 8 << 10;

/// Most bytes that are unpacked for one input.
const UNPACKED: u64 = 128 << 10;

/// What buffers hold before they are read into.
const UNTOUCHED: u8 = 0xee;

/// A range, what is there, and which layer says so: none where the layers hold nothing.
type Kind = (Range<u64>, Piece, Option<usize>);

/// Opens `image` with both readers, which must agree on the header.
pub fn open(path: &Path, image: Image) -> Option<(LayerReader, Naive)> {
    let length = image.length;
    let naive = Naive::open(image.clone());
    let reader = match LayerReader::from_source(path, image, length) {
        Ok(reader) => reader,
        Err(ReadError::Header { cause, .. }) => {
            if let Ok(naive) = naive {
                assert!(naive.head.may_be_refused(&cause, length), "refused: {cause}, {:?}", naive.head);
            }
            return None;
        }
        Err(error) => panic!("opening fails with {error}"),
    };
    let naive = naive.unwrap_or_else(|fault| panic!("opened in spite of {fault:?}: {reader:?}"));
    let (head, header) = (&naive.head, reader.header());
    assert!(head.features & 0b111 == 0 && head.crypt_method == 0 && head.snapshots == 0, "unfit: {head:?}");
    assert_eq!(header.version == Version::V2, head.version == 2);
    assert_eq!(header.cluster_bits.bits(), head.cluster_bits);
    assert_eq!(header.virtual_size, head.size);
    assert_eq!(header.extended_l2, head.extended());
    assert_eq!(header.compression_type == CompressionType::Zstd, head.zstd);
    Some((reader, naive))
}

/// Compares what is read of one layer, at its ends, at borders, and at `probes`.
pub fn layer(reader: &LayerReader, naive: Naive, probes: &[u64]) {
    let stack = Stack { layers: vec![naive], absent: UNTOUCHED };
    let map = |range| {
        let pieces: Result<Vec<_>, _> = reader.map(range).expect("in range").collect();
        let owner = |piece| (piece != Piece::Absent).then_some(0);
        Ok(pieces?.into_iter().map(|(range, piece)| (range, piece, owner(piece))).collect())
    };
    stack.compare(probes, map, |offset, buf| {
        let absent = reader.read_at(offset, buf)?;
        assert!(absent.iter().all(|range| range.start < range.end), "an empty range: {absent:?}");
        assert!(absent.windows(2).all(|pair| pair[0].end < pair[1].start), "not disjoint: {absent:?}");
        Ok(Some(absent))
    });
}

/// Compares what is read of a chain of `layers`, the newest first.
pub fn chain(reader: &ChainReader, layers: Vec<Naive>, probes: &[u64]) {
    let stack = Stack { layers, absent: 0 };
    let map = |range| {
        let pieces: Result<Vec<_>, _> = reader.map(range).expect("in range").collect();
        Ok(pieces?.into_iter().map(|found| (found.range, found.piece, found.layer)).collect())
    };
    stack.compare(probes, map, |offset, buf| reader.read_at(offset, buf).map(|()| None));
}

/// What the naive reader finds in a range.
struct Found {
    range: Range<u64>,
    cell: Cell,
    layer: Option<usize>,
}

struct Stack {
    /// The newest first.
    layers: Vec<Naive>,
    /// What is found in the buffer where no layer holds anything.
    absent: u8,
}

impl Stack {
    fn compare(
        &self,
        probes: &[u64],
        map: impl Fn(Range<u64>) -> Result<Vec<Kind>, ReadError>,
        read: impl Fn(u64, &mut [u8]) -> Result<Option<Vec<Range<u64>>>, ReadError>,
    ) {
        let mut unpacked = 0;
        for window in self.windows(probes) {
            let mapped = map(window.clone());
            let found = match self.find(&window) {
                Ok(found) => found,
                Err(fault) => {
                    assert!(mapped.is_err(), "{window:?} is mapped in spite of {fault:?}: {mapped:?}");
                    let mut buf = vec![0; (window.end - window.start) as usize];
                    // What is read before may be compressed: that it is not read on takes no time.
                    let result = read(window.start, &mut buf);
                    assert!(result.is_err(), "{window:?} is read in spite of {fault:?}");
                    continue;
                }
            };
            let mapped = mapped.unwrap_or_else(|error| panic!("{window:?} is not mapped: {error:?}"));
            let kinds = kinds(&found);
            assert_eq!(mapped, kinds, "{window:?}");
            unpacked += found.iter().map(|found| self.unpacks(found)).sum::<u64>();
            if unpacked <= UNPACKED {
                self.compare_bytes(&window, &found, &kinds, &read);
            }
        }
    }

    fn compare_bytes(
        &self,
        window: &Range<u64>,
        found: &[Found],
        kinds: &[Kind],
        read: impl Fn(u64, &mut [u8]) -> Result<Option<Vec<Range<u64>>>, ReadError>,
    ) {
        let mut buf = vec![UNTOUCHED; (window.end - window.start) as usize];
        let result = read(window.start, &mut buf);
        let mut expected = Vec::new();
        for found in found {
            let count = (found.range.end - found.range.start) as usize;
            let Some(layer) = found.layer else {
                expected.resize(expected.len() + count, self.absent);
                continue;
            };
            match self.layers[layer].content(found.cell, found.range.start, count) {
                Ok(content) => expected.extend(content),
                Err(Fault::Unknown) => return,
                Err(fault) => {
                    assert!(result.is_err(), "{:?} is read in spite of {fault:?}", found.range);
                    return;
                }
            }
        }
        let absent = result.unwrap_or_else(|error| panic!("{window:?} is not read: {error:?}"));
        if let Some(absent) = absent {
            let holes = kinds.iter().filter(|(_, _, layer)| layer.is_none());
            let holes: Vec<Range<u64>> = holes.map(|(range, _, _)| range.clone()).collect();
            assert_eq!(absent, holes, "{window:?}");
        }
        // At once: a comparison of each byte would be traced for the fuzzer.
        if buf != expected {
            let at = buf.iter().zip(&expected).position(|(one, other)| one != other);
            panic!("other bytes in {window:?}, from {at:?} on: {kinds:?}");
        }
    }

    /// Where to look: both ends, around the first borders between clusters and between L2 tables,
    /// around the ends of the layers below, and at `probes`.
    fn windows(&self, probes: &[u64]) -> Vec<Range<u64>> {
        let size = self.layers[0].head.size;
        let around = |at: u64| at.saturating_sub(64).min(size)..at.saturating_add(64).min(size);
        let mut windows = vec![0..FIRST.min(size), size.saturating_sub(FIRST / 2)..size];
        for layer in &self.layers {
            let head = &layer.head;
            windows.extend((1..6).map(|index| around(head.cluster() * index)));
            windows.extend((1..3).map(|index| around(head.coverage() * index)));
            windows.push(around(head.size));
        }
        windows.extend(probes.iter().map(|probe| {
            let start = probe % size.max(1);
            start..start.saturating_add(1500).min(size)
        }));
        windows.retain(|window| window.start < window.end);
        windows
    }

    fn find(&self, window: &Range<u64>) -> Result<Vec<Found>, Fault> {
        let mut all: Vec<Found> = Vec::new();
        let mut at = window.start;
        while at < window.end {
            let (cell, layer, end) = self.at(at)?;
            let range = at..end.min(window.end);
            at = range.end;
            match all.last_mut() {
                // So that each is unpacked once.
                Some(last)
                    if matches!(cell, Cell::Compressed(..))
                        && (last.cell, last.layer) == (cell, layer)
                        && layer
                            .is_some_and(|layer| range.start % self.layers[layer].head.cluster() != 0) =>
                {
                    last.range.end = range.end;
                }
                _ => all.push(Found { range, cell, layer }),
            }
        }
        Ok(all)
    }

    /// What is at `guest`, which layer says so, and where that may end.
    fn at(&self, guest: u64) -> Result<(Cell, Option<usize>, u64), Fault> {
        let mut end = u64::MAX;
        for (index, layer) in self.layers.iter().enumerate() {
            if guest >= layer.head.size {
                // It hides what is below.
                break;
            }
            let (cell, until) = layer.cell(guest)?;
            end = end.min(until).min(layer.head.size);
            if cell != Cell::Absent {
                return Ok((cell, Some(index), end));
            }
        }
        Ok((Cell::Absent, None, end))
    }

    fn unpacks(&self, found: &Found) -> u64 {
        match (found.cell, found.layer) {
            (Cell::Compressed(..), Some(layer)) => self.layers[layer].head.cluster(),
            _ => 0,
        }
    }
}

/// What was found, with like neighbours joined.
fn kinds(found: &[Found]) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = Vec::new();
    for found in found {
        let piece = match found.cell {
            Cell::Data(_) => Piece::Data,
            Cell::Zero => Piece::Zero,
            Cell::Absent => Piece::Absent,
            Cell::Compressed(..) => Piece::Compressed,
        };
        match kinds.last_mut() {
            Some(last) if (last.1, last.2) == (piece, found.layer) => last.0.end = found.range.end,
            _ => kinds.push((found.range.clone(), piece, found.layer)),
        }
    }
    kinds
}
