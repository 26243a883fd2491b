//! Asking whoever has an image open whether he is still there.

use std::ffi::c_char;
use std::ptr;
use std::time::Duration;

use rados_sys::rados_ioctx_t;
use rustix::io::Errno;

use super::cluster::{Pool, c_string};
use super::error::RbdError;

/// Who answered a notification, and who did not, by the clients' numbers (`client.N` in Ceph's messages).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Those who did.
    pub answered: Vec<u64>,
    /// Those who did not, though they count as alive.
    pub silent: Vec<u64>,
}

impl Pool {
    /// Tells everyone who has the image of the given id open for writing that its header has changed, and
    /// waits for their answers, at most as long as `limit`. Blocks.
    ///
    /// A client that has answered takes account of a new snapshot in all writes that it begins from then on;
    /// those that it began before may still be under way. The message is the empty one, which stands for a
    /// changed header in all of librbd and krbd (`ImageWatcher::process_payload` in librbd,
    /// `rbd_watch_cb` in the kernel).
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NotUnderstood`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn notify_watchers(&self, image_id: &str, limit: Duration) -> Result<Answers, RbdError> {
        let what = || format!("notify whoever has the image of id {image_id} open");
        let header = c_string(&format!("rbd_header.{image_id}"), what)?;
        let millis = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let pool = self.clone();
        let (code, reply) = self.patience().call(what, move || {
            let mut reply = Reply { buffer: ptr::null_mut(), length: 0 };
            // SAFETY: the pool is open, the name lives through the call; a null buffer is an empty message.
            let code = unsafe { notify(pool.raw(), header.as_ptr(), millis, &mut reply) };
            (code, reply.bytes().to_vec())
        })?;
        // Those who did not answer are an error to librados; the reply names them all the same.
        if code < 0 && code != -Errno::TIMEDOUT.raw_os_error() {
            return Err(RbdError::failed(what(), code));
        }
        parse(&reply).ok_or_else(|| RbdError::NotUnderstood { what: what() })
    }
}

/// What librados answered, until this is dropped.
struct Reply {
    buffer: *mut c_char,
    length: usize,
}

impl Reply {
    fn bytes(&self) -> &[u8] {
        if self.buffer.is_null() {
            return &[];
        }
        // SAFETY: librados gave a buffer of this length.
        unsafe { std::slice::from_raw_parts(self.buffer.cast_const().cast(), self.length) }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.buffer.is_null() {
            // SAFETY: librados gave it, and nobody uses it any more.
            unsafe { rados_sys::rados_buffer_free(self.buffer) };
        }
    }
}

/// # Safety
/// The I/O context is open, and `object` is a C string.
unsafe fn notify(io: rados_ioctx_t, object: *const c_char, millis: u64, reply: &mut Reply) -> i32 {
    // SAFETY: the caller's, and both places for the reply are there.
    unsafe {
        rados_sys::rados_notify2(io, object, ptr::null(), 0, millis, &mut reply.buffer, &mut reply.length)
    }
}

/// The reply's form is that of `rados_notify2` in librados.h, little-endian: the number of answers (u32), for
/// each the client (u64), its watch (u64) and what it said (u32 and so many bytes); then the number of those
/// that did not answer (u32), for each the client (u64) and its watch (u64).
fn parse(reply: &[u8]) -> Option<Answers> {
    let mut rest = reply;
    let mut answers = Answers::default();
    if rest.is_empty() {
        // Nobody was there.
        return Some(answers);
    }
    for _ in 0..number::<4>(&mut rest)? {
        answers.answered.push(number::<8>(&mut rest)?);
        number::<8>(&mut rest)?;
        let said = usize::try_from(number::<4>(&mut rest)?).ok()?;
        rest = rest.get(said..)?;
    }
    for _ in 0..number::<4>(&mut rest)? {
        answers.silent.push(number::<8>(&mut rest)?);
        number::<8>(&mut rest)?;
    }
    rest.is_empty().then_some(answers)
}

fn number<const BYTES: usize>(rest: &mut &[u8]) -> Option<u64> {
    let (first, after) = rest.split_at_checked(BYTES)?;
    *rest = after;
    Some(first.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(answered: &[(u64, &[u8])], silent: &[u64]) -> Vec<u8> {
        let mut bytes = u32::try_from(answered.len()).unwrap().to_le_bytes().to_vec();
        for (client, said) in answered {
            bytes.extend(client.to_le_bytes());
            bytes.extend(77_u64.to_le_bytes());
            bytes.extend(u32::try_from(said.len()).unwrap().to_le_bytes());
            bytes.extend(*said);
        }
        bytes.extend(u32::try_from(silent.len()).unwrap().to_le_bytes());
        for client in silent {
            bytes.extend(client.to_le_bytes());
            bytes.extend(88_u64.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn who_answered_and_who_did_not_is_read() {
        let answers = parse(&reply(&[(4100, b""), (u64::MAX, b"yes")], &[7, 8])).unwrap();
        assert_eq!(answers, Answers { answered: vec![4100, u64::MAX], silent: vec![7, 8] });
        assert_eq!(parse(&reply(&[], &[])), Some(Answers::default()));
        assert_eq!(parse(&[]), Some(Answers::default()));
    }

    #[test]
    fn a_reply_that_is_cut_off_or_too_long_is_not_understood() {
        let whole = reply(&[(1, b"abc")], &[2]);
        for length in 1..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length} bytes of {}", whole.len());
        }
        let longer = [&whole[..], &[0]].concat();
        assert_eq!(parse(&longer), None);
    }
}
