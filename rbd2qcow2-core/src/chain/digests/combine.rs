//! The digests of a layer that takes over what another holds.

use std::ops::Range;

use super::{Content, DigestRecord, DigestsError};

/// Why the digests of two layers were not put together.
#[derive(Debug)]
pub(crate) enum CombineError<E> {
    /// They cannot be read.
    Digests(DigestsError),
    /// Data of the layer below could not be read.
    Read(E),
    /// Data of the layer below are not what its digests say.
    Content(Range<u64>),
    /// A stop was asked for.
    Stopped,
}

/// Hands over the records of what two layers show together: those of `above`, and of `below` as far as
/// nothing of `above` covers them. Both ascend, and so does what is handed over.
///
/// Where data of a record below are covered in part, what is left needs hashes of its own: `read` reads
/// the whole of it first, which must be what the record says. It fills a buffer from an offset on.
///
/// # Errors
/// [`CombineError`]; [`CombineError::Stopped`] where `push` says so by returning `false`.
pub(crate) fn combine<E>(
    below: impl Iterator<Item = Result<DigestRecord, DigestsError>>,
    above: impl Iterator<Item = Result<DigestRecord, DigestsError>>,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    mut push: impl FnMut(DigestRecord) -> bool,
) -> Result<(), CombineError<E>> {
    let mut push = |record| if push(record) { Ok(()) } else { Err(CombineError::Stopped) };
    let mut above = above.map(|record| record.map_err(CombineError::Digests)).peekable();
    for old in below {
        let old = old.map_err(CombineError::Digests)?;
        // What of it is covered by nothing, each with the record above that follows.
        let mut parts: Vec<(Range<u64>, Option<DigestRecord>)> = Vec::new();
        let mut at = old.offset;
        loop {
            let new = match above.peek() {
                Some(Ok(new)) if new.offset < old.end() => *new,
                Some(Err(_)) => return Err(above.next().and_then(Result::err).expect("it was seen")),
                _ => break,
            };
            let left = at..new.offset.max(at);
            at = at.max(new.end());
            if new.end() > old.end() {
                // It goes on above what follows.
                parts.push((left, None));
                break;
            }
            above.next();
            parts.push((left, Some(new)));
        }
        parts.push((at.min(old.end())..old.end(), None));
        let whole = old.offset..old.end();
        let cut = parts.iter().any(|(left, _)| !left.is_empty() && *left != whole);
        let content = match old.content {
            Content::Data(hash) if cut => Some(verified(&old, hash, &mut read)?),
            _ => None,
        };
        for (left, new) in parts {
            if !left.is_empty() {
                let content = match &content {
                    Some(bytes) => {
                        let start = in_memory(left.start - old.offset);
                        Content::Data(blake3::hash(&bytes[start..start + in_memory(left.end - left.start)]))
                    }
                    None => old.content,
                };
                push(DigestRecord { offset: left.start, length: left.end - left.start, content })?;
            }
            new.map_or(Ok(()), &mut push)?;
        }
    }
    above.try_for_each(|new| push(new?))
}

fn verified<E>(
    record: &DigestRecord,
    hash: blake3::Hash,
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Vec<u8>, CombineError<E>> {
    // No longer than a chunk.
    let mut bytes = vec![0; in_memory(record.length)];
    read(record.offset, &mut bytes).map_err(CombineError::Read)?;
    if blake3::hash(&bytes) != hash {
        return Err(CombineError::Content(record.offset..record.end()));
    }
    Ok(bytes)
}

fn in_memory(length: u64) -> usize {
    usize::try_from(length).expect("within a record")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// What is there of each byte: nothing, a zero, or data.
    type Held = Vec<Option<u8>>;

    /// Records of runs that are alike, data cut at multiples of `chunk`.
    fn records(held: &Held, chunk: usize) -> Vec<DigestRecord> {
        let kind = |byte: &Option<u8>| byte.map(|byte| byte != 0);
        let mut records = Vec::new();
        let mut start = 0;
        while start < held.len() {
            let of = kind(&held[start]);
            let data = of == Some(true);
            let end = (start + 1..held.len())
                .find(|at| kind(&held[*at]) != of || (data && at % chunk == 0))
                .unwrap_or(held.len());
            if let Some(data) = of {
                let bytes: Vec<u8> = held[start..end].iter().flatten().copied().collect();
                let content = if data { Content::Data(blake3::hash(&bytes)) } else { Content::Zero };
                records.push(DigestRecord { offset: start as u64, length: (end - start) as u64, content });
            }
            start = end;
        }
        records
    }

    fn held() -> impl Strategy<Value = Held> {
        let run = (prop_oneof![Just(None), Just(Some(0)), (1_u8..=255).prop_map(Some)], 1_usize..30);
        prop::collection::vec(run, 0..20).prop_map(|runs| {
            let bytes = runs.into_iter().flat_map(|(byte, length)| vec![byte; length]);
            bytes.chain(std::iter::repeat(None)).take(200).collect()
        })
    }

    proptest! {
        #[test]
        fn the_records_are_those_of_both_together(below in held(), above in held()) {
            let mut both = Vec::new();
            let failed = combine::<Infallible>(
                records(&below, 16).into_iter().map(Ok),
                records(&above, 16).into_iter().map(Ok),
                |offset, buffer| {
                    for (at, byte) in (usize::try_from(offset).unwrap()..).zip(buffer) {
                        *byte = below[at].unwrap();
                    }
                    Ok(())
                },
                |record| {
                    both.push(record);
                    true
                },
            );
            prop_assert!(failed.is_ok());
            let merged: Held = above.iter().zip(&below).map(|(above, below)| above.or(*below)).collect();
            let mut end = 0;
            let mut found = vec![None; merged.len()];
            for record in both {
                prop_assert!(record.offset >= end && record.length > 0);
                end = record.end();
                let range = usize::try_from(record.offset).unwrap()..usize::try_from(end).unwrap();
                let bytes: Option<Vec<u8>> = merged[range.clone()].iter().copied().collect();
                let bytes = bytes.expect("all of it is held");
                match record.content {
                    Content::Data(hash) => {
                        prop_assert_eq!(blake3::hash(&bytes), hash);
                        prop_assert_eq!(range.start / 16, (range.end - 1) / 16, "data of one chunk");
                    }
                    Content::Zero => prop_assert!(bytes.iter().all(|byte| *byte == 0)),
                }
                found[range.clone()].copy_from_slice(&merged[range]);
            }
            prop_assert_eq!(found, merged, "all that is held has a record");
        }
    }

    #[test]
    fn data_that_have_changed_get_no_new_hash() {
        let below = vec![Some(7); 16];
        let mut above = vec![None; 16];
        above[3] = Some(9);
        let result = combine::<Infallible>(
            records(&below, 16).into_iter().map(Ok),
            records(&above, 16).into_iter().map(Ok),
            |_, buffer| {
                buffer.fill(8);
                Ok(())
            },
            |_| true,
        );
        assert!(matches!(result, Err(CombineError::Content(range)) if range == (0..16)));
    }
}
