//! The RBD snapshots of a chain: a new one, the left-over ones, the old ones.

use std::cell::Cell;
use std::time::Duration;

use rustix::io::Errno;

use super::{Backup, BackupError, Plan};
use crate::cancel::Cancel;
use crate::chain::manifest::Manifest;
use crate::chain::names::{ChainId, SnapshotName};
use crate::chain::{Announcement, ChainWriter};
use crate::error::Causes;
use crate::rbd::{Features, Image, Patience, Pool, RbdError, Snapshot};
use crate::source::librbd::LibrbdSource;

/// How long a failed run tries to remove its snapshot; what it leaves, the next run removes.
const REMOVE_LIMIT: Duration = Duration::from_secs(30);

/// The same for an interrupted run, whose user is waiting. A cluster that is well needs a second at
/// most.
const REMOVE_LIMIT_INTERRUPTED: Duration = Duration::from_secs(3);

/// The snapshot that a run takes. Removed on drop, unless a point was made of it.
pub(super) struct NewSnapshot<'a> {
    pool: &'a Pool,
    image: &'a str,
    name: String,
    /// Tells an interrupted run from a failed one.
    cancel: &'a Cancel,
    /// Where the snapshot may have been announced.
    chain: &'a ChainWriter,
    keep: Cell<bool>,
    /// Whether the request for it was given up, and may come true at any later time.
    unanswered: Cell<bool>,
}

impl<'a> NewSnapshot<'a> {
    /// Takes the snapshot.
    pub(super) fn take(
        pool: &'a Pool,
        image: &'a str,
        name: SnapshotName,
        cancel: &'a Cancel,
        chain: &'a ChainWriter,
    ) -> Result<Self, RbdError> {
        // Made first: a call that was given up may have made the snapshot all the same.
        let (keep, unanswered) = (Cell::new(false), Cell::new(true));
        let snapshot = Self { pool, image, name: name.to_string(), cancel, chain, keep, unanswered };
        let created = pool.create_snapshot(image, &snapshot.name);
        snapshot.unanswered.set(matches!(created, Err(RbdError::NoAnswer { .. } | RbdError::Cancelled)));
        created?;
        Ok(snapshot)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Leaves the snapshot in the cluster.
    pub(super) fn keep(&self) {
        self.keep.set(true);
    }
}

impl Drop for NewSnapshot<'_> {
    fn drop(&mut self) {
        if self.keep.get() {
            return;
        }
        let limit = if self.cancel.is_set() { REMOVE_LIMIT_INTERRUPTED } else { REMOVE_LIMIT };
        // The run's own patience has ended with its failure.
        let pool = self.pool.with_patience(Patience { limit, cancel: Cancel::new() });
        match pool.remove_snapshot(self.image, &self.name) {
            // Without the image there is no snapshot either.
            Err(error) if !error.is_not_found() => {
                log::warn!(
                    "{}: snapshot {} stays for now, the next backup of this image removes it: {}",
                    self.image,
                    self.name,
                    Causes(&error)
                );
            }
            // There being none now says nothing of later: only the note leads the next run to it.
            _ if self.unanswered.get() => {}
            _ => {
                if let Err(error) = self.chain.clear_announcement() {
                    log::warn!("{}; the next backup of this image tries again", Causes(&error));
                }
            }
        }
    }
}

/// A snapshot that a point can be made of: it was there before and after all was read.
#[derive(Clone, Copy)]
pub(super) struct Taken {
    pub(super) name: SnapshotName,
    pub(super) id: u64,
}

impl Backup<'_> {
    /// Checks, once everything was compared and read, that the new snapshot and its base are still
    /// there, and what else the reading relied on. What the cluster tells of a snapshot that somebody removes
    /// meanwhile, and perhaps makes again, is nothing to rely on.
    pub(super) fn still_true(
        &self,
        pool: &Pool,
        plan: &Plan,
        source: &LibrbdSource,
        name: SnapshotName,
    ) -> Result<Taken, BackupError> {
        // A handle that is open for reading shows the snapshots of when it was opened.
        let head = pool.open(self.image, None)?;
        let (read, listed) = (source.image().snapshots()?, head.snapshots()?);
        if let Some(base) = plan.base_listed()
            && !listed.iter().any(|snapshot| snapshot.id == base.id)
        {
            return Err(BackupError::SnapshotGone { snapshot: base.name.clone() });
        }
        let text = name.to_string();
        let read = read.iter().find(|snapshot| snapshot.name == text);
        match read.filter(|read| listed.iter().any(|snapshot| snapshot.id == read.id)) {
            Some(snapshot) => {
                source.confirm_by(&head)?;
                Ok(Taken { name, id: snapshot.id })
            }
            None => Err(BackupError::SnapshotGone { snapshot: text }),
        }
    }

    /// Removes the snapshots that no point tells of: killed runs of this chain left them behind, or the
    /// point was pruned.
    pub(super) fn remove_unfinished_snapshots(
        &self,
        pool: &Pool,
        head: &Image,
        chain: &ChainWriter,
    ) -> Result<(), BackupError> {
        // Of a chain whose points are all lost nobody would know, once what is left of them was moved away.
        let chain_of = |manifest: &Option<Manifest>| Some(manifest.as_ref()?.record.chain);
        let catalogue = chain.catalogue();
        let present: Vec<_> =
            catalogue.points().iter().filter_map(|point| chain_of(&point.manifest)).collect();
        let mut lost: Vec<_> = catalogue.lost().iter().filter_map(|lost| chain_of(&lost.manifest)).collect();
        lost.retain(|id| !present.contains(id));
        chain.retire(&lost)?;
        let announced = chain.announced()?;
        let mut own = chain.own_chains()?;
        own.extend(announced.iter().map(|note| note.snapshot.chain));
        let listed = head.snapshots()?;
        let guard = self.guard(chain.catalogue(), &head.info()?, &listed);
        let unfinished = own_snapshots(&listed, &own)
            .into_iter()
            // Of a point that is lost it may be all that is left.
            .filter(|name| chain.catalogue().point(name.point).is_none())
            .filter(|name| !chain.catalogue().is_missed(name.point))
            // Its point was pruned, and it is needed all the same.
            .filter(|name| guard.as_ref() != Some(&name.to_string()));
        for name in unfinished {
            log::info!("{}: removing snapshot {name}, which is that of no point", self.image);
            match pool.remove_snapshot(self.image, &name.to_string()) {
                Ok(()) => {}
                // Somebody protected or cloned it: no reason to do without backups from now on.
                Err(error @ RbdError::Failed { errno: Errno::BUSY, .. }) => {
                    log::warn!("{}: {error}; remove it by hand", self.image);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let is_own = |name: &str| SnapshotName::parse(name).is_ok_and(|name| own.contains(&name.chain));
        for snapshot in head.trashed_snapshots()?.iter().filter(|snapshot| is_own(&snapshot.name)) {
            match pool.remove_trashed_snapshot(self.image, snapshot) {
                Ok(()) => log::info!(
                    "{}: removed snapshot {}, which a run that was killed had begun to remove",
                    self.image,
                    snapshot.name
                ),
                // A clone needs it; with the clone, the cluster removes it.
                Err(error @ RbdError::Failed { .. }) => log::debug!("{}: {error}", self.image),
                Err(error) => return Err(error.into()),
            }
        }
        let here = |note: &Announcement| {
            note.fsid == self.fsid && note.pool == self.pool_name && note.namespace == self.namespace
        };
        // A note about another pool's image of this name says nothing of the snapshots here.
        if announced.as_ref().is_some_and(here) {
            chain.clear_announcement()?;
        }
        Ok(())
    }

    /// Removes the snapshots of this chain that no later backup needs. The point is safe already, so
    /// what fails here is only told.
    pub(super) fn remove_older_snapshots(
        &self,
        pool: &Pool,
        source: &LibrbdSource,
        chain: &ChainWriter,
        newest: SnapshotName,
    ) {
        // What cannot be told now is left for the next backup.
        let mut own = chain.own_chains().unwrap_or_else(|error| {
            log::warn!("{}: {}; the point is safe", self.image, Causes(&error));
            chain.catalogue().chain_ids()
        });
        own.push(newest.chain);
        let result = source.image().snapshots().and_then(|snapshots| {
            let mut names = own_snapshots(&snapshots, &own);
            // The next backup's base, whatever time the others claim to be of.
            names.retain(|name| *name != newest && !chain.catalogue().is_missed(name.point));
            names.sort_by_key(|name| std::cmp::Reverse(name.point));
            // Where a snapshot may go on changing, the one before it tells: see `Plan`.
            let guards = usize::from(!source.info().features.has(Features::EXCLUSIVE_LOCK));
            for name in names.iter().skip(self.options.keep_snapshots.saturating_sub(1) + guards) {
                match pool.remove_snapshot(self.image, &name.to_string()) {
                    // Somebody protected it: the older ones are to go nevertheless.
                    Err(error @ RbdError::Failed { .. }) => log::warn!("{}: {error}", self.image),
                    result => result?,
                }
            }
            Ok(())
        });
        if let Err(error) = result {
            log::warn!("{}: {}; the point is safe, the next backup tries again", self.image, Causes(&error));
        }
        if let Err(error) = chain.clear_announcement() {
            log::warn!("{}: {}; the point is safe", self.image, Causes(&error));
        }
    }
}

/// Those snapshots that are of one of the chains `own`.
fn own_snapshots(snapshots: &[Snapshot], own: &[ChainId]) -> Vec<SnapshotName> {
    let names = snapshots.iter().filter_map(|snapshot| SnapshotName::parse(&snapshot.name).ok());
    names.filter(|name| own.contains(&name.chain)).collect()
}
