//! The image that is restored to: found or made, marked, and nobody else's meanwhile.

use std::time::{Duration, Instant};

use super::error::ImageError;
use super::marker::Marker;
use super::{INCOMPLETE_KEY, ImageTarget, describe_incomplete, layout};
use crate::cancel::Cancel;
use crate::point::OpenPoint;
use crate::rbd::{Ancestry, Features, Image, ImageInfo, NewImage, Pool, RbdError};

/// How long the cluster takes a client that died for alive, and a little more
/// (`osd_client_watch_timeout` is 30 s).
const WATCH_TIMEOUT: Duration = Duration::from_secs(40);

/// What there is of the image.
enum Found {
    Nothing,
    /// It may be restored to. `created` tells whether a restore made it.
    Image {
        created: bool,
        /// Whether it has a mark already.
        marked: bool,
    },
}

/// An image that is marked as incomplete, and open for writing.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) image: Image,
    pub(super) info: ImageInfo,
    /// Whether it is certain to hold nothing.
    pub(super) empty: bool,
    /// Whether a restore, this or an earlier one, made it.
    pub(super) created: bool,
    /// Where it takes its data from, as that was before it was opened.
    pub(super) ancestry: Ancestry,
}

/// Finds or makes the image, and marks it. Nothing was changed in what it holds but after
/// [`ImageError::Incomplete`] and [`ImageError::Interrupted`].
pub(super) fn open(
    target: &ImageTarget,
    pool: &Pool,
    point: &OpenPoint,
    cancel: &Cancel,
) -> Result<Opened, ImageError> {
    let failed = |cause| ImageError::Rbd { image: target.to_string(), cause };
    let record = point.record();
    let new = layout::new_image(target, record, target.overrides.size.unwrap_or(point.size()));
    check_fits(target, new.size, point)?;
    let (created, marked) = match find(target, pool, point, &new, cancel)? {
        Found::Nothing => {
            layout::create(target, pool, &new, record).map_err(|error| match error {
                error if error.is_already_there() => ImageError::HalfMade { image: target.to_string() },
                cause => failed(cause),
            })?;
            (true, false)
        }
        Found::Image { created, marked } => (created, marked),
    };
    let ancestry = pool.open(&target.image, None).and_then(|image| pool.ancestry(&image, &target.image));
    let ancestry = ancestry.map_err(failed)?;
    let image = pool.open_for_writing(&target.image).map_err(failed)?;
    // Somebody may have come since it was looked at: of two restores that do, each sees the other.
    match check_unused(target, &image, Duration::ZERO, cancel) {
        Err(ImageError::UsersUnknown { .. }) if created => {}
        checked => checked?,
    }
    let was = image.info().map_err(failed)?;
    let size = match (created, target.overrides.size) {
        (true, _) | (_, Some(_)) => new.size,
        (false, None) => was.size,
    };
    check_fits(target, size, point)?;
    if was.features.has(Features::EXCLUSIVE_LOCK) {
        // Nobody else has it open. Whoever comes meanwhile must not write.
        image.lock_exclusively().map_err(failed)?;
    }
    let marker = Marker::new(point.image().as_str(), point.name(), created);
    image.set_metadata(INCOMPLETE_KEY, &marker.value()).map_err(|cause| match cause {
        cause @ RbdError::Failed { .. } => failed(cause),
        // It may be there, or come to be.
        cause => cut_short(target, cause),
    })?;
    if size != was.size
        && let Err(cause) = image.resize(size)
    {
        // An image that was good stays so: what lies behind its end was not there.
        let unchanged = matches!(cause, RbdError::Failed { .. }) && size > was.size && !created && !marked;
        return Err(match unchanged && image.remove_metadata(INCOMPLETE_KEY).is_ok() {
            true => failed(cause),
            false => cut_short(target, cause),
        });
    }
    let info = image.info().map_err(|cause| cut_short(target, cause))?;
    Ok(Opened { image, info, empty: was.size == 0, created, ancestry })
}

/// The error of an image that has its mark, or may have it.
fn cut_short(target: &ImageTarget, cause: RbdError) -> ImageError {
    let image = target.to_string();
    match cause {
        RbdError::Cancelled => ImageError::Interrupted { image },
        cause => ImageError::Incomplete { image, cause: cause.into() },
    }
}

fn check_fits(target: &ImageTarget, size: u64, point: &OpenPoint) -> Result<(), ImageError> {
    let needed = point.size();
    if size < needed {
        return Err(ImageError::TooSmall { image: target.to_string(), size, needed });
    }
    Ok(())
}

/// Looks whether there is such an image, and whether it may be restored to.
fn find(
    target: &ImageTarget,
    pool: &Pool,
    point: &OpenPoint,
    new: &NewImage,
    cancel: &Cancel,
) -> Result<Found, ImageError> {
    let failed = |cause| ImageError::Rbd { image: target.to_string(), cause };
    // Opened for reading it is not in use by us.
    let image = match pool.open(&target.image, None) {
        Ok(image) => image,
        Err(error) if error.is_not_found() => return Ok(Found::Nothing),
        Err(cause) => return Err(failed(cause)),
    };
    let info = image.info().map_err(failed)?;
    let metadata = image.metadata().map_err(failed)?;
    let wanted = Marker::new(point.image().as_str(), point.name(), true);
    let marker = metadata.get(INCOMPLETE_KEY);
    let mut continues = false;
    let created = match marker.map(|value| (value, Marker::parse(value))) {
        // One that was there before had --overwrite said for it, and has it said again: it may have been
        // marked only, and be good.
        Some((_, Some(marker))) if marker.continues(&wanted) && (marker.created || target.overwrite) => {
            continues = true;
            marker.created
        }
        Some((value, marker)) => {
            if !target.overwrite {
                let of = describe_incomplete(value);
                return Err(ImageError::Unfinished { image: target.to_string(), of });
            }
            marker.is_some_and(|marker| marker.created)
        }
        // Made by a restore that did not come to mark it; or by somebody, to hold what comes now. One
        // with snapshots has a past, and was shrunk.
        None if info.size == 0 && image.snapshots().map_err(failed)?.is_empty() => true,
        None if target.overwrite => false,
        None => return Err(ImageError::Exists { image: target.to_string() }),
    };
    check_layout(target, &info, new)?;
    if !continues {
        // The restore that it continues may have had to do without some of them.
        check_features(target, &info)?;
    }
    // Most likely the user of a half restored image is the restore that died.
    let limit = if marker.is_some() || created { WATCH_TIMEOUT } else { Duration::ZERO };
    check_unused(target, &image, limit, cancel)?;
    Ok(Found::Image { created, marked: marker.is_some() })
}

/// What was asked for explicitly must be so.
fn check_layout(target: &ImageTarget, info: &ImageInfo, new: &NewImage) -> Result<(), ImageError> {
    let asked = &target.overrides;
    let (unit, count) = new.striping.unwrap_or((info.object_size, 1));
    let checks = [
        ("objects of", asked.object_size, info.object_size),
        ("a stripe unit of", asked.stripe_unit.map(|_| unit), info.stripe_unit),
        ("a stripe count of", asked.stripe_count.map(|_| count), info.stripe_count),
    ];
    for (what, wanted, has) in checks {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != has) {
            return Err(other_layout(target, what, has.to_string(), wanted.to_string()));
        }
    }
    Ok(())
}

/// The same for features, and for the pool of the data, which is told by a feature.
fn check_features(target: &ImageTarget, info: &ImageInfo) -> Result<(), ImageError> {
    let asked = &target.overrides;
    let chosen = |features: Features| {
        let others = Features::STRIPING.with(Features::DATA_POOL).with(Features(!Features::SETTABLE.0));
        features.without(others)
    };
    if let Some(wanted) = asked.features.map(chosen).filter(|wanted| *wanted != chosen(info.features)) {
        let has = chosen(info.features).to_string();
        return Err(other_layout(target, "the features", has, wanted.to_string()));
    }
    let elsewhere = asked.data_pool.as_ref().filter(|pool| **pool != target.pool);
    if let Some(wanted) = elsewhere.filter(|_| !info.features.has(Features::DATA_POOL)) {
        return Err(other_layout(target, "its data in pool", target.pool.clone(), wanted.clone()));
    }
    Ok(())
}

fn other_layout(target: &ImageTarget, what: &'static str, has: String, wanted: String) -> ImageError {
    ImageError::Layout { image: target.to_string(), what, has, wanted }
}

/// Waits for up to `limit` until nobody else has the image open for writing.
pub(super) fn check_unused(
    target: &ImageTarget,
    image: &Image,
    limit: Duration,
    cancel: &Cancel,
) -> Result<(), ImageError> {
    let start = Instant::now();
    let mut told = false;
    loop {
        let clients =
            image.other_watchers().map_err(|cause| ImageError::Rbd { image: target.to_string(), cause })?;
        let Some(clients) = clients else {
            return Err(ImageError::UsersUnknown { image: target.to_string() });
        };
        if clients.is_empty() {
            return Ok(());
        }
        if start.elapsed() >= limit {
            return Err(ImageError::InUse { image: target.to_string(), clients });
        }
        if cancel.is_set() {
            return Err(ImageError::Rbd { image: target.to_string(), cause: RbdError::Cancelled });
        }
        if !told {
            told = true;
            log::info!("{target}: waiting until the cluster takes the client that restored to it for dead");
        }
        cancel.sleep(Duration::from_millis(500));
    }
}
