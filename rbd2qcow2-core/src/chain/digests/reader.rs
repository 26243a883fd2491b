//! Reading a file of digests back.

use std::io::{BufReader, Read};
use std::path::Path;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{
    CHUNK_MAX, CHUNK_MIN, Content, DigestRecord, DigestsError, KIND_DATA, KIND_ZERO, MAGIC, RawFooter,
    RawHeader, RawRecord, VERSION,
};
use crate::qcow2::open_regular;

/// Reads the records of a file of digests, in ascending order, in a fixed amount of memory.
///
/// Every record is checked on its own and against its predecessor. Whether the file as a whole is
/// what was written is known only at its end: the iterator then yields an error instead of ending.
/// After an error it yields nothing more.
#[derive(Debug)]
pub struct DigestReader<R> {
    input: R,
    /// Of all bytes read so far.
    hasher: blake3::Hasher,
    /// In bytes.
    chunk_size: u32,
    /// Number of records, by the file's length.
    records: u64,
    /// Number of the record to read next.
    next: u64,
    /// First byte behind the record before.
    end: u64,
    /// Whether the footer was checked, or an error was returned.
    done: bool,
}

impl DigestReader<BufReader<std::fs::File>> {
    /// Opens the file at `path` and checks its header and length.
    ///
    /// # Errors
    /// [`DigestsError::NotARegularFile`], and those of [`new`](Self::new).
    pub fn open(path: &Path) -> Result<Self, DigestsError> {
        let opened = open_regular(path).map_err(DigestsError::Read)?;
        let (file, metadata) = opened.ok_or(DigestsError::NotARegularFile)?;
        Self::new(BufReader::new(file), metadata.len())
    }
}

impl<R: Read> DigestReader<R> {
    /// Begins to read `input`, which yields `bytes` bytes, and checks the header.
    ///
    /// # Errors
    /// [`DigestsError::Read`], [`DigestsError::Header`], [`DigestsError::Length`].
    pub fn new(input: R, bytes: u64) -> Result<Self, DigestsError> {
        let frame = (size_of::<RawHeader>() + size_of::<RawFooter>()) as u64;
        let record = size_of::<RawRecord>() as u64;
        let records = match bytes.checked_sub(frame) {
            Some(length) if length.is_multiple_of(record) => length / record,
            _ => return Err(DigestsError::Length { bytes }),
        };
        let mut reader = Self {
            input,
            hasher: blake3::Hasher::new(),
            chunk_size: 0,
            records,
            next: 0,
            end: 0,
            done: false,
        };
        let header: RawHeader = reader.raw()?;
        if header.magic != MAGIC {
            return Err(DigestsError::Header("it begins with other bytes"));
        }
        if header.version != VERSION {
            return Err(DigestsError::Header("its version is another one: use a newer rbd2qcow2"));
        }
        reader.chunk_size = header.chunk_size.get();
        if !reader.chunk_size.is_power_of_two() || !(CHUNK_MIN..=CHUNK_MAX).contains(&reader.chunk_size) {
            return Err(DigestsError::Header("its chunk size is impossible"));
        }
        Ok(reader)
    }

    /// The chunk size in bytes, a power of two.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    fn raw<T: FromBytes + FromZeros + IntoBytes>(&mut self) -> Result<T, DigestsError> {
        let mut raw = T::new_zeroed();
        self.input.read_exact(raw.as_mut_bytes()).map_err(DigestsError::Read)?;
        self.hasher.update(raw.as_mut_bytes());
        Ok(raw)
    }

    fn record(&mut self) -> Result<DigestRecord, DigestsError> {
        let raw: RawRecord = self.raw()?;
        let damaged = |reason| DigestsError::Record { index: self.next, reason };
        let (offset, length) = (raw.offset.get(), raw.length.get());
        if length == 0 {
            return Err(damaged("it covers nothing"));
        }
        let end = offset.checked_add(length.into()).ok_or(damaged("it ends behind 2^64"))?;
        if offset < self.end {
            return Err(damaged("it does not follow the one before"));
        }
        let content = match raw.kind.get() {
            KIND_DATA => {
                let chunk = u64::from(self.chunk_size);
                if offset / chunk != (end - 1) / chunk {
                    return Err(damaged("its data do not lie in one chunk"));
                }
                Content::Data(raw.blake3.into())
            }
            KIND_ZERO if raw.blake3 == [0; 32] => Content::Zero,
            KIND_ZERO => return Err(damaged("it has a hash, but stands for zeroes")),
            _ => return Err(damaged("its kind is unknown")),
        };
        self.end = end;
        self.next += 1;
        Ok(DigestRecord { offset, length: length.into(), content })
    }

    fn footer(&mut self) -> Result<(), DigestsError> {
        let mut raw = RawFooter::new_zeroed();
        self.input.read_exact(raw.as_mut_bytes()).map_err(DigestsError::Read)?;
        self.hasher.update(raw.records.as_bytes());
        if raw.records != self.records {
            return Err(DigestsError::Footer("records are missing"));
        }
        if self.hasher.finalize() != raw.blake3 {
            return Err(DigestsError::Footer("its checksum does not match"));
        }
        Ok(())
    }
}

impl<R: Read> Iterator for DigestReader<R> {
    type Item = Result<DigestRecord, DigestsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = if self.next < self.records {
            Some(self.record())
        } else {
            self.done = true;
            self.footer().err().map(Err)
        };
        self.done |= matches!(item, Some(Err(_)));
        item
    }
}
