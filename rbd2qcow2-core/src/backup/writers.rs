//! Whoever writes to an image that has no exclusive lock, and may go on writing into a new snapshot.
//!
//! A snapshot is only a number that writers send along with each write. With an exclusive lock its owner takes
//! the snapshot itself, between two writes. Without one every client that has the image open has to hear of
//! it first: until then it writes into the snapshot, after it was taken and even after it was read.

use std::time::Duration;

use super::BackupError;
use crate::cancel::Cancel;
use crate::rbd::{Features, ImageInfo, Pool};

/// How long a client may take to answer. One that is well needs milliseconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long writes that were under way when their client answered may take to arrive. Nothing tells when they
/// have; OSDs that are well need milliseconds. What arrives still later the next backup finds: see `Plan`.
const UNDER_WAY: Duration = Duration::from_secs(1);

/// Clients that have an image open did not answer.
#[derive(Debug, thiserror::Error)]
#[error(
    "{image} has no exclusive-lock, and {} that {} it open did not answer for {} s: {} could go on writing into a \
     new snapshot, so none is used. See `rbd status {image}`: is the machine frozen, or its host gone (then the \
     client goes after 30 s)? `rbd feature enable {image} exclusive-lock` ends this",
    named(clients),
    if clients.len() == 1 { "has" } else { "have" },
    waited.as_secs(),
    if clients.len() == 1 { "it" } else { "they" }
)]
pub struct Unheard {
    /// `POOL/[NAMESPACE/]IMAGE`.
    pub image: String,
    /// The clients' numbers.
    pub clients: Vec<u64>,
    /// How long they were given.
    pub waited: Duration,
}

fn named(clients: &[u64]) -> String {
    clients.iter().map(|client| format!("client.{client}")).collect::<Vec<_>>().join(", ")
}

/// The writers of an image.
pub(super) struct Writers<'a> {
    pool: &'a Pool,
    image: &'a str,
    image_id: String,
    locked: bool,
    /// Clients that earlier runs were. One that was killed does not answer, and never wrote.
    earlier: Vec<u64>,
    stop: &'a Cancel,
}

impl<'a> Writers<'a> {
    pub(super) fn of(
        pool: &'a Pool,
        image: &'a str,
        info: &ImageInfo,
        earlier: Vec<u64>,
        stop: &'a Cancel,
    ) -> Self {
        let locked = info.features.has(Features::EXCLUSIVE_LOCK);
        Self { pool, image, image_id: info.id.clone(), locked, earlier, stop }
    }

    /// Makes sure, before a snapshot is taken, that all of them are going to hear of it, and tells how many
    /// there are. With an exclusive lock nobody needs to.
    pub(super) fn answer(&self) -> Result<usize, BackupError> {
        if self.locked {
            return Ok(0);
        }
        let mut answers = self.pool.notify_watchers(&self.image_id, ANSWER_LIMIT)?;
        answers.silent.retain(|client| !self.earlier.contains(client));
        if answers.silent.is_empty() {
            return Ok(answers.answered.len());
        }
        let (image, clients) = (self.pool.spec(self.image), answers.silent);
        Err(Unheard { image, clients, waited: ANSWER_LIMIT }.into())
    }

    /// What cannot be excluded of a point, in words.
    pub(super) fn not_excluded(&self) -> Option<String> {
        (!self.locked).then(|| {
            format!(
                "writes that came into the snapshot more than {} s after it was taken, as the image has no \
                 exclusive-lock; the next backup has them",
                UNDER_WAY.as_secs()
            )
        })
    }

    /// Makes sure, after a snapshot was taken, that all of them have heard of it, and lets their writes arrive
    /// that were under way.
    pub(super) fn settle(&self) -> Result<(), BackupError> {
        if self.answer()? > 0 {
            self.stop.sleep(UNDER_WAY);
        }
        Ok(())
    }
}
