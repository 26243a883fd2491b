//! Packing clusters.

use std::io;

use flate2::{Compress, FlushCompress, Status};
use zstd::zstd_safe::{CCtx, CParameter, get_error_name, zstd_sys::ZSTD_ErrorCode};

use super::header::CompressionType;

/// The window of zlib streams, as a power of two: QEMU unpacks with 4 KiB and calls anything that
/// reaches further back damaged.
const ZLIB_WINDOW_BITS: u8 = 12;

/// Zlib's level: the library's, and QEMU's, default.
const ZLIB_LEVEL: u32 = 6;

/// Packs clusters, one after the other. What a codec sets up for that is kept.
pub struct Compressor {
    codec: Codec,
    packed: Vec<u8>,
}

enum Codec {
    Zlib(Compress),
    Zstd(CCtx<'static>),
}

impl Compressor {
    /// A compressor for clusters of `cluster_size` bytes. `level` is that of Zstandard, 1 to 22; zlib
    /// has just one here. Takes a few hundred KiB for low levels, 17 cluster sizes for the
    /// highest.
    ///
    /// # Errors
    /// When the codec refuses the level, or gets no memory.
    pub fn new(kind: CompressionType, level: u8, cluster_size: usize) -> io::Result<Self> {
        let codec = match kind {
            CompressionType::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                Codec::Zlib(Compress::new_with_window_bits(level, false, ZLIB_WINDOW_BITS))
            }
            CompressionType::Zstd => {
                let mut context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
                let set = context.set_parameter(CParameter::CompressionLevel(level.into()));
                set.map_err(|code| io::Error::other(get_error_name(code)))?;
                Codec::Zstd(context)
            }
        };
        Ok(Self { codec, packed: vec![0; cluster_size] })
    }

    /// Packs a whole cluster, or its beginning to see how it goes. `None` when that would take more than
    /// `most` bytes, which must be no more than a cluster.
    ///
    /// # Errors
    /// When the codec fails, for lack of memory most likely.
    ///
    /// # Panics
    /// When `most` is larger than the cluster size.
    pub fn pack(&mut self, cluster: &[u8], most: usize) -> io::Result<Option<&[u8]>> {
        let room = &mut self.packed[..most];
        let length = match &mut self.codec {
            Codec::Zlib(stream) => {
                stream.reset();
                let status = stream.compress(cluster, room, FlushCompress::Finish)?;
                // Bounded by the room.
                (status == Status::StreamEnd).then(|| usize::try_from(stream.total_out()).unwrap_or(most))
            }
            Codec::Zstd(context) => match context.compress2(room, cluster) {
                Ok(length) => Some(length),
                Err(code) if is_too_small(code) => None,
                Err(code) => return Err(io::Error::other(get_error_name(code))),
            },
        };
        Ok(length.map(|length| &self.packed[..length]))
    }
}

/// Whether an error of Zstandard says that the output does not fit. Codes are negated.
fn is_too_small(code: usize) -> bool {
    code.wrapping_neg() == ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::compressed::unpack;

    /// A cluster of text-like bytes, with repetitions from near and far.
    fn sample(length: usize) -> Vec<u8> {
        let words = [&b"snapshot "[..], b"extent ", b"layer ", b"chain ", b"point ", b"grain\n"];
        let mut state = 1_u32;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes.extend(words[(state >> 16) as usize % words.len()]);
        }
        bytes.truncate(length);
        bytes
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        words.flatten().take(length).collect()
    }

    const KINDS: [(CompressionType, u8); 4] = [
        (CompressionType::Zlib, 0),
        (CompressionType::Zstd, 1),
        (CompressionType::Zstd, 3),
        (CompressionType::Zstd, 22),
    ];

    #[test]
    fn what_is_packed_is_unpacked() {
        for (kind, level) in KINDS {
            for size in [512, 65536, if level == 1 { 2 << 20 } else { 4096 }] {
                let mut compressor = Compressor::new(kind, level, size).expect("made");
                for _ in 0..2 {
                    for cluster in [sample(size), vec![0; size], vec![7; size]] {
                        let packed = compressor.pack(&cluster, size - 1).expect("packed");
                        let packed = packed.expect("smaller").to_vec();
                        assert!(packed.len() < size / 2, "{kind:?} {level} {size}: {}", packed.len());
                        let mut unpacked = vec![1; size];
                        unpack(kind, &packed, &mut unpacked).expect("unpacked");
                        assert!(unpacked == cluster);
                    }
                    assert_eq!(compressor.pack(&noise(size), size - 1).expect("tried"), None);
                }
            }
        }
    }

    #[test]
    fn what_does_not_get_small_enough_is_refused() {
        for (kind, level) in KINDS {
            let cluster = sample(65536);
            let mut compressor = Compressor::new(kind, level, 65536).expect("made");
            let length = compressor.pack(&cluster, 65535).expect("packed").expect("smaller").len();
            for most in [1, length / 2, length - 1] {
                assert_eq!(compressor.pack(&cluster, most).expect("tried"), None, "{kind:?} {most}");
            }
        }
    }

    #[test]
    fn a_compressor_can_be_handed_to_another_thread() {
        fn sendable<T: Send>() {}
        sendable::<Compressor>();
    }
}
