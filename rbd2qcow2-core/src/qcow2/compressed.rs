//! Unpacking compressed clusters.

use flate2::{Decompress, FlushDecompress, Status};

use super::header::CompressionType;

/// Why packed data are not a cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// They are no stream of the file's compression type, or a damaged one.
    #[error("the packed data are damaged: {0}")]
    Damaged(String),
    /// The stream goes on behind the space that it has in the file.
    #[error("the packed data are cut off")]
    CutOff,
    /// They unpack to less than a cluster.
    #[error("the packed data hold {found} bytes instead of a cluster of {expected}")]
    Short {
        /// What they hold.
        found: usize,
        /// The cluster size.
        expected: usize,
    },
    /// They unpack to more than a cluster.
    #[error("the packed data hold more than a cluster of {expected} bytes")]
    Long {
        /// The cluster size.
        expected: usize,
    },
}

/// Unpacks the stream at the beginning of `packed` into all of `cluster`. What follows the stream is
/// ignored: where it ends is not recorded in the file.
///
/// Memory is bounded: whatever the stream says, no more than `cluster` and the decoder's fixed state
/// (some 100 KiB) is used.
///
/// # Errors
/// Every [`UnpackError`].
pub fn unpack(kind: CompressionType, packed: &[u8], cluster: &mut [u8]) -> Result<(), UnpackError> {
    unpack_stream(kind, packed, cluster).map(|_| ())
}

/// As [`unpack`], and returns the length of the stream in bytes, no more than those of `packed`: so much
/// is needed to unpack the cluster, and nothing behind it.
///
/// # Errors
/// Every [`UnpackError`].
pub fn unpack_stream(kind: CompressionType, packed: &[u8], cluster: &mut [u8]) -> Result<usize, UnpackError> {
    match kind {
        CompressionType::Zlib => inflate(packed, cluster),
        CompressionType::Zstd => unpack_zstd(packed, cluster),
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> Result<usize, UnpackError> {
    let expected = cluster.len();
    match inflate_at_once(packed, cluster)? {
        Inflated { status: Status::StreamEnd, found, stream } if found == expected => Ok(stream),
        Inflated { status: Status::StreamEnd, found, .. } => Err(UnpackError::Short { found, expected }),
        Inflated { found, .. } if found < expected => Err(UnpackError::CutOff),
        _ => {
            // Behind the cluster only the mark of the end may follow: room for one byte more tells
            // data from the lack of it.
            let Inflated { found, .. } = inflate_at_once(packed, &mut vec![0; expected + 1])?;
            Err(if found > expected { UnpackError::Long { expected } } else { UnpackError::CutOff })
        }
    }
}

/// How far unpacking came.
struct Inflated {
    status: Status,
    /// Bytes that were unpacked.
    found: usize,
    /// Bytes that were taken for that. The decoder gives back what it had looked at beyond the end.
    stream: usize,
}

/// Unpacks into the beginning of `target` as much as there is, or as fits.
///
/// In a single call, which finds references to what was before the beginning. Over several calls the
/// decoder would keep a window of its own, full of zeroes at first, and take those for data.
fn inflate_at_once(packed: &[u8], target: &mut [u8]) -> Result<Inflated, UnpackError> {
    // Raw deflate with any window; QEMU writes one of 4 KiB.
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(packed, target, FlushDecompress::Finish)
        .map_err(|error| UnpackError::Damaged(error.to_string()))?;
    // Held by the slices' lengths, so they fit.
    Ok(Inflated {
        status,
        found: usize::try_from(stream.total_out()).unwrap_or(target.len()),
        stream: usize::try_from(stream.total_in()).unwrap_or(packed.len()),
    })
}

/// QEMU allows for several frames, so this does too.
fn unpack_zstd(packed: &[u8], cluster: &mut [u8]) -> Result<usize, UnpackError> {
    let expected = cluster.len();
    let damaged = |error: std::io::Error| UnpackError::Damaged(error.to_string());
    // Frame by frame into the cluster itself: a streaming decoder would first allocate the window
    // that the frame asks for.
    let mut decoder = zstd::bulk::Decompressor::new().map_err(damaged)?;
    let (mut rest, mut found) = (packed, 0);
    while found < expected {
        if rest.is_empty() {
            return Err(UnpackError::Short { found, expected });
        }
        let length = zstd::zstd_safe::find_frame_compressed_size(rest)
            .map_err(|code| UnpackError::Damaged(zstd::zstd_safe::get_error_name(code).to_owned()))?;
        let (frame, behind) = rest.split_at_checked(length).ok_or(UnpackError::CutOff)?;
        let room = &mut cluster[found..];
        if zstd::zstd_safe::get_frame_content_size(frame)
            .is_ok_and(|size| size.is_some_and(|size| size > room.len() as u64))
        {
            return Err(UnpackError::Long { expected });
        }
        found += decoder.decompress_to_buffer(frame, room).map_err(damaged)?;
        rest = behind;
    }
    Ok(packed.len() - rest.len())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn deflate(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(data).expect("memory");
        encoder.finish().expect("memory")
    }

    fn pack(kind: CompressionType, data: &[u8]) -> Vec<u8> {
        match kind {
            CompressionType::Zlib => deflate(data),
            CompressionType::Zstd => zstd::bulk::compress(data, 3).expect("memory"),
        }
    }

    /// Something that compresses, but not to nothing.
    fn sample(length: usize) -> Vec<u8> {
        (0..length).map(|index| u8::try_from((index * index / 7) % 251).expect("below 251")).collect()
    }

    const BOTH: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];

    #[test]
    fn a_cluster_is_unpacked_whatever_follows() {
        for kind in BOTH {
            let data = sample(65536);
            let mut packed = pack(kind, &data);
            packed.extend([0xa5; 300]);
            let mut cluster = vec![0; data.len()];
            assert_eq!(unpack(kind, &packed, &mut cluster), Ok(()));
            assert!(cluster == data);
        }
    }

    #[test]
    fn a_stream_ends_where_it_ends_whatever_follows() {
        for kind in BOTH {
            for length in [512, 4096, 65536] {
                let data = sample(length);
                let stream = pack(kind, &data);
                // Nothing, something, and the next cluster's stream.
                for behind in [vec![], vec![0; 511], vec![0xff; 65536], stream.clone()] {
                    let packed = [stream.clone(), behind].concat();
                    let mut cluster = vec![0; length];
                    assert_eq!(unpack_stream(kind, &packed, &mut cluster), Ok(stream.len()), "{kind:?}");
                    assert!(cluster == data);
                }
            }
        }
    }

    #[test]
    fn less_and_more_than_a_cluster_are_errors() {
        for kind in BOTH {
            for length in [0, 1, 4095, 4097, 100 << 20] {
                let packed = pack(kind, &vec![0; length]);
                let error = unpack(kind, &packed, &mut [0; 4096]).expect_err("no cluster");
                let expected = match length {
                    0..4096 => UnpackError::Short { found: length, expected: 4096 },
                    _ => UnpackError::Long { expected: 4096 },
                };
                assert_eq!(error, expected, "{kind:?}, {length}");
            }
        }
    }

    #[test]
    fn several_frames_make_a_cluster() {
        let data = sample(8192);
        let mut packed = pack(CompressionType::Zstd, &data[..1000]);
        packed.extend(pack(CompressionType::Zstd, &data[1000..]));
        let length = packed.len();
        // Those that follow are none of it, whatever they hold.
        packed.extend(pack(CompressionType::Zstd, &[]));
        let mut cluster = vec![0; data.len()];
        assert_eq!(unpack_stream(CompressionType::Zstd, &packed, &mut cluster), Ok(length));
        assert_eq!(unpack(CompressionType::Zstd, &packed, &mut cluster), Ok(()));
        assert!(cluster == data);
    }

    #[test]
    fn a_reference_to_before_the_beginning_is_an_error() {
        // The last block, of fixed codes: 258 bytes from one byte back, and the end.
        let error = unpack(CompressionType::Zlib, &[0x1b, 0x05, 0x00], &mut [0; 258]).expect_err("damaged");
        assert!(matches!(error, UnpackError::Damaged(_)), "{error}");
        // The same behind one byte, 'A'.
        let mut cluster = [0; 259];
        assert_eq!(unpack(CompressionType::Zlib, &[0x73, 0x1c, 0x05, 0x00], &mut cluster), Ok(()));
        assert_eq!(cluster, [b'A'; 259]);
    }

    #[test]
    fn data_without_an_end_are_cut_off() {
        let data = sample(4096);
        let packed = deflate(&data);
        // The end takes 7 bits or more.
        let error = unpack(CompressionType::Zlib, &packed[..packed.len() - 1], &mut [0; 4096]);
        assert_eq!(error, Err(UnpackError::CutOff));
    }

    #[test]
    fn every_cut_and_every_changed_byte_ends_in_a_result() {
        for kind in BOTH {
            let packed = pack(kind, &sample(4096));
            let mut cluster = [0; 4096];
            for length in 0..packed.len() {
                assert!(unpack_stream(kind, &packed[..length], &mut cluster).is_err(), "{kind:?}, {length}");
            }
            for index in 0..packed.len() {
                let mut changed = packed.clone();
                changed[index] ^= 0x55;
                changed.extend([0x3c; 20]);
                // What is said to be the stream is all that it takes.
                if let Ok(length) = unpack_stream(kind, &changed, &mut cluster) {
                    let mut again = [0; 4096];
                    assert_eq!(unpack_stream(kind, &changed[..length], &mut again), Ok(length));
                    assert!(again == cluster);
                }
            }
        }
    }
}
