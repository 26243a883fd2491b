//! What changed between two snapshots, as librbd reports it.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use rbd2qcow2_sys as sys;
use rustix::io::Errno;

use super::cluster::c_string;
use super::error::{RbdError, check};
use super::image::Image;
use crate::cancel::Cancel;
use crate::extent::{Extent, ExtentKind};

/// How finely librbd compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// Asks every object's OSD for the extents that were written.
    Bytes,
    /// Believes the object maps, where there are valid ones, and reports whole objects.
    Objects,
}

/// What the callback works on.
struct Visit<S> {
    state: S,
    each: fn(&mut S, Extent),
    range: Range<u64>,
    cancel: Cancel,
    /// Why the callback asked librbd to stop.
    stopped: Option<Stop>,
}

enum Stop {
    Cancelled,
    Panicked,
}

/// What librbd calls for each extent, in the thread that asked.
extern "C" fn visit<S>(offset: u64, length: usize, exists: c_int, arg: *mut c_void) -> c_int {
    // -ENOENT would be taken for success.
    const STOP: c_int = -Errno::CANCELED.raw_os_error();
    // SAFETY: `arg` is the Visit<S> of the `fold` that made this call and waits for it.
    let visit = unsafe { &mut *arg.cast::<Visit<S>>() };
    if visit.cancel.is_set() {
        visit.stopped = Some(Stop::Cancelled);
        return STOP;
    }
    let start = offset.max(visit.range.start);
    let end = offset.saturating_add(length as u64).min(visit.range.end);
    if start >= end {
        return 0;
    }
    let kind = if exists == 0 { ExtentKind::Zero } else { ExtentKind::Data };
    let extent = Extent { offset: start, length: end - start, kind };
    // A panic must not unwind into C++.
    if catch_unwind(AssertUnwindSafe(|| (visit.each)(&mut visit.state, extent))).is_err() {
        visit.stopped = Some(Stop::Panicked);
        return STOP;
    }
    0
}

impl Image {
    /// Calls `each` for every extent of `range` that changed between the snapshot `from` (`None`:
    /// the beginning of time) and this handle's, and gives the state that it worked on.
    ///
    /// The extents are disjoint and lie in `range`, in no order that can be relied on. `range` must
    /// not be empty, must end at the image's size at the latest and should start at a multiple of
    /// the object size (times the stripe count). `with_parent` adds what shows through from a
    /// clone's parent, and works only from the beginning of time. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn diff<S: Send + 'static>(
        &self,
        from: Option<&str>,
        range: Range<u64>,
        granularity: Granularity,
        with_parent: bool,
        state: S,
        each: fn(&mut S, Extent),
    ) -> Result<S, RbdError> {
        let (start, end) = (range.start, range.end);
        let title = self.title().to_owned();
        let since = from.map_or(String::new(), |from| format!(" since snapshot {from:?}"));
        let what = move || format!("list the changes in bytes {start}..{end} of {title}{since}");
        let from = from.map(|from| c_string(from, &what)).transpose()?;
        let cancel = self.patience().cancel.clone();
        let (code, visit) = self.call(&what, move |raw| {
            let mut visit = Visit { state, each, range, cancel, stopped: None };
            // SAFETY: the image is open; the name and `visit` live through the call, and the
            // callback is called in this thread, one call after the other (librbd's DiffIterate).
            let code = unsafe {
                sys::rbd_diff_iterate2(
                    raw,
                    from.as_ref().map_or(ptr::null(), |from| from.as_ptr()),
                    start,
                    end - start,
                    u8::from(with_parent),
                    u8::from(granularity == Granularity::Objects),
                    Some(self::visit::<S>),
                    ptr::from_mut(&mut visit).cast(),
                )
            };
            (code, visit)
        })?;
        match visit.stopped {
            Some(Stop::Cancelled) => Err(RbdError::Cancelled),
            Some(Stop::Panicked) => panic!("the visitor of a diff panicked"),
            None => check(code, what).map(|_| visit.state),
        }
    }
}
