//! Looking digests up by their place.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use zerocopy::{FromZeros, IntoBytes};

use super::{
    Content, DigestRecord, DigestsError, DigestsInfo, KIND_DATA, KIND_ZERO, RawFooter, RawHeader, RawRecord,
};
use crate::qcow2::open_regular;

/// Records that are read at a time: 3 KiB of them.
const BATCH: usize = 64;

/// A file of digests that is what its manifest says, open to be asked by place. Can be shared by threads.
#[derive(Debug)]
pub(crate) struct DigestIndex {
    file: File,
    records: u64,
}

impl DigestIndex {
    /// Opens the file at `path`, and checks that it is the one that `info` describes. Reads all of it.
    ///
    /// # Errors
    /// Those of [`DigestsInfo::check_file`], [`DigestsError::Length`].
    pub(crate) fn open(path: &Path, info: &DigestsInfo) -> Result<Self, DigestsError> {
        info.check_file(path)?;
        let opened = open_regular(path).map_err(DigestsError::Read)?;
        let (file, metadata) = opened.ok_or(DigestsError::NotARegularFile)?;
        let frame = (size_of::<RawHeader>() + size_of::<RawFooter>()) as u64;
        let bytes = metadata.len();
        let length = bytes.checked_sub(frame).ok_or(DigestsError::Length { bytes })?;
        Ok(Self { file, records: length / size_of::<RawRecord>() as u64 })
    }

    /// The records that lie wholly within `range`, in bytes of the image: ascending.
    ///
    /// # Errors
    /// [`DigestsError::Read`], [`DigestsError::Record`].
    pub(crate) fn within(&self, range: &Range<u64>) -> Result<Vec<DigestRecord>, DigestsError> {
        let (mut low, mut high) = (0, self.records);
        while low < high {
            let middle = low + (high - low) / 2;
            let mut raw = [RawRecord::new_zeroed()];
            self.read(middle, &mut raw)?;
            if raw[0].offset.get() < range.start { low = middle + 1 } else { high = middle }
        }
        let mut found = Vec::new();
        let mut batch = [RawRecord::new_zeroed(); BATCH];
        while low < self.records {
            let count = usize::try_from(self.records - low).unwrap_or(BATCH).min(BATCH);
            self.read(low, &mut batch[..count])?;
            for raw in &batch[..count] {
                let record = record(raw).ok_or(DigestsError::Record {
                    index: low,
                    reason: "it is none of those that are written",
                })?;
                if record.end() > range.end {
                    return Ok(found);
                }
                found.push(record);
                low += 1;
            }
        }
        Ok(found)
    }

    fn read(&self, first: u64, records: &mut [RawRecord]) -> Result<(), DigestsError> {
        let at = size_of::<RawHeader>() as u64 + first * size_of::<RawRecord>() as u64;
        self.file.read_exact_at(records.as_mut_bytes(), at).map_err(DigestsError::Read)
    }
}

fn record(raw: &RawRecord) -> Option<DigestRecord> {
    let content = match raw.kind.get() {
        KIND_DATA => Content::Data(raw.blake3.into()),
        KIND_ZERO => Content::Zero,
        _ => return None,
    };
    let (offset, length) = (raw.offset.get(), raw.length.get().into());
    offset.checked_add(length).map(|_| DigestRecord { offset, length, content })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::digests::DigestWriter;

    #[test]
    fn records_are_found_by_their_place() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("digests");
        let writer = DigestWriter::create(&path, 1 << 16).expect("created");
        let segment = writer.segment(0);
        let mut all = Vec::new();
        for number in 0..500_u64 {
            // Every third chunk is not there, and others are short.
            let (offset, length) = (number * 65_536 + number % 2 * 512, 4096 * (number % 3) * 2);
            if number % 5 == 1 && length > 0 {
                segment.add_zero(offset..offset + length);
            } else {
                segment.add(offset, &vec![1; usize::try_from(length).unwrap()]);
            }
            if length > 0 {
                all.push(offset..offset + length);
            }
        }
        drop(segment);
        let info = writer.finish().expect("finished");
        let index = DigestIndex::open(&path, &info).expect("opened");
        for range in [
            0..u64::MAX,
            0..0,
            0..65_536,
            65_536..73_729,
            66_048..74_240,
            66_049..1 << 24,
            1 << 24..1 << 25,
            1 << 40..1 << 41,
        ] {
            let found = index.within(&range).expect("read");
            let expected = all.iter().filter(|one| range.start <= one.start && one.end <= range.end);
            assert!(
                found.iter().map(|record| record.offset..record.end()).eq(expected.cloned()),
                "{range:?}"
            );
        }
        let other = DigestsInfo { bytes: info.bytes, blake3: blake3::hash(b"") };
        assert!(matches!(DigestIndex::open(&path, &other), Err(DigestsError::OtherFile)));
    }
}
