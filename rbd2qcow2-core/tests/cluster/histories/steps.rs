//! What happens to an image and to those that it depends on, between and during its backups.

use super::world::{Outcome, World};
use crate::cluster::unique_image;
use crate::driver::{Layout, Result};
use rbd2qcow2_core::options::DiffMode;

/// A kind of step, which says what a run may come to because of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Write,
    Discard,
    WriteZeroes,
    Resize,
    ShrinkAndGrow,
    Snapshot,
    RemoveSnapshot,
    Rollback,
    Flatten,
    FlattenParent,
    RemoveAncestor,
    TrashParentSnapshot,
    TrashParent,
    MigrateParent,
    MapsOff,
    MapsOn,
    FastDiffOff,
    RebuildHead,
    RebuildAll,
    InvalidateMaps,
    LockOff,
    LockOn,
    StaleWrite,
    Prepare,
    Execute,
    Commit,
    Abort,
    RemoveOurs,
    TrashOurs,
    TrashImage,
    DeepCopy,
}

/// Which truth holds for a point, and whether there must be one, once a step was played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// There is a point, and it is what the objects of its snapshot hold.
    Right,
    /// The same, or there is none if it was played during the run, which depended on what has changed.
    RightOrRefused,
    /// The same, or there is none from now on until it is mended: a map may lie, or what the base holds is
    /// not what its point holds. The reason must say so.
    RightOrMended,
}

/// Steps that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Theme {
    /// What every image goes through. No run may fail.
    Ordinary,
    Ancestors,
    Maps,
    /// Writes with an old snapshot context.
    Stale,
    /// The same to an image without exclusive-lock.
    StaleWithoutLock,
    Migration,
    /// Of whole images and of the snapshots of backups.
    Removals,
}

pub const THEMES: [Theme; 7] = [
    Theme::Ordinary,
    Theme::Ancestors,
    Theme::Maps,
    Theme::Stale,
    Theme::StaleWithoutLock,
    Theme::Migration,
    Theme::Removals,
];

const ORDINARY: &[Step] = &[
    Step::Write,
    Step::Write,
    Step::Write,
    Step::Discard,
    Step::Discard,
    Step::WriteZeroes,
    Step::Resize,
    Step::ShrinkAndGrow,
    Step::Snapshot,
    Step::Snapshot,
    Step::RemoveSnapshot,
    Step::Rollback,
    Step::Rollback,
];

impl Theme {
    /// Those of its steps that ordinary images do not see.
    pub fn steps(self) -> &'static [Step] {
        use Step::*;
        match self {
            Self::Ordinary => &[],
            Self::Ancestors => &[
                Flatten,
                FlattenParent,
                RemoveAncestor,
                RemoveAncestor,
                TrashParentSnapshot,
                TrashParent,
                MigrateParent,
            ],
            Self::Maps => &[
                MapsOff,
                MapsOn,
                MapsOn,
                FastDiffOff,
                RebuildHead,
                RebuildHead,
                RebuildAll,
                InvalidateMaps,
                LockOff,
                LockOn,
                Rollback,
            ],
            Self::Stale => &[StaleWrite, StaleWrite, StaleWrite, Write, RebuildHead, RebuildAll],
            Self::StaleWithoutLock => &[StaleWrite, StaleWrite, LockOn, LockOff, Rollback],
            Self::Migration => &[Prepare, Prepare, Execute, Commit, Abort, ShrinkAndGrow],
            Self::Removals => &[RemoveOurs, TrashOurs, TrashImage, DeepCopy, Flatten],
        }
    }
}

/// All that some history must have played.
pub fn all() -> Vec<Step> {
    let mut steps: Vec<_> = THEMES.iter().flat_map(|theme| theme.steps()).chain(ORDINARY).copied().collect();
    steps.sort_unstable();
    steps.dedup();
    steps
}

impl Step {
    pub fn rule(self) -> Rule {
        use Step::*;
        match self {
            Write | Discard | WriteZeroes | Resize | ShrinkAndGrow | Snapshot | RemoveSnapshot | Rollback
            | DeepCopy => Rule::Right,
            Flatten | FlattenParent | RemoveAncestor | TrashParentSnapshot | TrashParent | MigrateParent
            | RemoveOurs | TrashOurs | TrashImage => Rule::RightOrRefused,
            MapsOff | MapsOn | FastDiffOff | RebuildHead | RebuildAll | InvalidateMaps | LockOff | LockOn
            | StaleWrite | Prepare | Execute | Commit | Abort => Rule::RightOrMended,
        }
    }

    /// One for the theme; half of all are ordinary.
    pub fn draw(world: &mut World) -> Self {
        let own = world.theme.steps();
        let step = match own.is_empty() || world.random.one_in(2) {
            true => world.random.pick(ORDINARY),
            false => world.random.pick(own),
        };
        // The head's map forgets what a snapshot's map never had, and then only a scan finds it.
        let forgets = matches!(step, Self::Rollback) && world.theme == Theme::Stale;
        if forgets && world.store.options.diff != DiffMode::Scan { Self::Write } else { step }
    }

    /// Plays it, unless it makes no sense now.
    ///
    /// # Errors
    /// The cluster has refused it, or the second client broke down.
    pub fn play(self, world: &mut World) -> Result<Outcome> {
        match self {
            Self::Write | Self::Discard | Self::WriteZeroes => self.change(world),
            Self::Resize | Self::ShrinkAndGrow => self.resize(world),
            Self::Snapshot | Self::RemoveSnapshot | Self::Rollback => self.snapshot(world),
            Self::Flatten
            | Self::FlattenParent
            | Self::RemoveAncestor
            | Self::TrashParentSnapshot
            | Self::TrashParent
            | Self::MigrateParent => self.ancestors(world),
            Self::StaleWrite => stale_write(world),
            Self::Prepare | Self::Execute | Self::Commit | Self::Abort => self.migrate(world),
            Self::RemoveOurs | Self::TrashOurs | Self::TrashImage | Self::DeepCopy => self.remove(world),
            _ => self.features(world),
        }
    }

    fn change(self, world: &mut World) -> Result<Outcome> {
        let (offset, length) = world.range()?;
        let seed = world.random.next();
        world.tell(format!("{self:?} {offset}+{length}, seed {seed}"));
        let (driver, spec) = (&world.store.driver, &world.spec);
        match self {
            Self::Write => driver.write(spec, offset, length, seed)?,
            Self::Discard => driver.discard(spec, offset, length)?,
            _ => driver.write_zeroes(spec, offset, length)?,
        }
        Ok(Outcome::Played)
    }

    fn resize(self, world: &mut World) -> Result<Outcome> {
        let old = world.size()?;
        let size = world.draw_size();
        let small = world.random.below(old + 1);
        let with_snapshot = world.random.one_in(2);
        world.tell(format!("{self:?} to {size} or {small} and back, snapshot {with_snapshot}"));
        if self == Self::Resize {
            world.store.driver.resize(&world.spec, size)?;
            return Ok(Outcome::Played);
        }
        world.store.driver.resize(&world.spec, small)?;
        if with_snapshot {
            world.snapshot()?;
        }
        world.store.driver.resize(&world.spec, old)?;
        Ok(Outcome::Played)
    }

    fn snapshot(self, world: &mut World) -> Result<Outcome> {
        if self == Self::Snapshot {
            world.snapshot()?;
            return Ok(Outcome::Played);
        }
        if self == Self::RemoveSnapshot && world.is_migrating()? {
            // It would take every writer with it.
            return Ok(Outcome::Pointless);
        }
        let users = |name: &str| name.starts_with("user-");
        let Some(snap) = world.pick_snapshot(|name| self == Self::Rollback || users(name))? else {
            return Ok(Outcome::Pointless);
        };
        world.tell(format!("{self:?} {snap}"));
        match self {
            Self::Rollback => world.store.driver.rollback(&world.spec, &snap)?,
            _ => world.store.driver.snap_remove(&world.spec, &snap)?,
        }
        Ok(Outcome::Played)
    }

    fn ancestors(self, world: &mut World) -> Result<Outcome> {
        world.tell(format!("{self:?}"));
        let driver = &world.store.driver;
        if self == Self::Flatten {
            if driver.info(&world.spec, None)?.overlap == 0 {
                return Ok(Outcome::Pointless);
            }
            driver.flatten(&world.spec)?;
            return Ok(Outcome::Played);
        }
        // The nearest one is the first.
        let Some(parent) = world.ancestors.first().cloned() else { return Ok(Outcome::Pointless) };
        match self {
            Self::FlattenParent => {
                if driver.info(&parent, None)?.overlap == 0 {
                    return Ok(Outcome::Pointless);
                }
                driver.flatten(&parent)?;
                driver.close(&parent)?;
            }
            Self::RemoveAncestor => {
                // The oldest one, or, as the image may be flattened before its parent, the nearest one.
                let old = world.ancestors.len() - 1;
                let mut free = None;
                for index in [old, 0] {
                    if driver.children(&world.ancestors[index])?.is_empty() {
                        free = Some(index);
                        break;
                    }
                }
                let Some(index) = free else { return Ok(Outcome::Pointless) };
                let ancestor = world.ancestors[index].clone();
                for snap in driver.snaps(&ancestor)? {
                    driver.snap_remove(&ancestor, &snap.name)?;
                }
                driver.close(&ancestor)?;
                driver.purge(&ancestor)?;
                world.ancestors.remove(index);
            }
            Self::TrashParentSnapshot => {
                let Some(snap) = driver.snaps(&parent)?.pop() else { return Ok(Outcome::Pointless) };
                driver.snap_remove(&parent, &snap.name)?;
                driver.close(&parent)?;
            }
            Self::TrashParent => {
                let id = driver.trash_move(&parent)?;
                driver.trash_restore(&parent, &id)?;
            }
            _ => {
                driver.migration_prepare(&parent, &parent, &Layout::default())?;
                driver.migration_execute(&parent)?;
                driver.migration_commit(&parent)?;
            }
        }
        Ok(Outcome::Played)
    }

    fn features(self, world: &mut World) -> Result<Outcome> {
        world.tell(format!("{self:?}"));
        let (driver, spec) = (&world.store.driver, &world.spec);
        let features = driver.info(spec, None)?.features;
        let has = |name: &str| features.iter().any(|feature| feature == name);
        let maps: &[&str] = &["object-map", "fast-diff"];
        match self {
            Self::MapsOff if has("object-map") => {
                let on: Vec<_> = maps.iter().copied().filter(|name| has(name)).collect();
                driver.update_features(spec, &on, false)?;
            }
            Self::MapsOn if has("exclusive-lock") && !has("object-map") => {
                driver.update_features(spec, maps, true)?;
                // Snapshots keep their invalid maps.
                driver.rebuild_object_map(spec, None)?;
            }
            Self::FastDiffOff if has("fast-diff") => {
                driver.update_features(spec, &["fast-diff"], false)?;
                driver.update_features(spec, &["fast-diff"], true)?;
            }
            Self::InvalidateMaps if has("fast-diff") => driver.invalidate_object_maps(spec)?,
            Self::RebuildHead if has("object-map") => driver.rebuild_object_map(spec, None)?,
            Self::RebuildAll if has("object-map") => {
                driver.rebuild_object_map(spec, None)?;
                for snap in driver.snaps(spec)? {
                    driver.rebuild_object_map(spec, Some(&snap.name))?;
                }
            }
            Self::LockOff if has("exclusive-lock") => {
                let on: Vec<_> = maps.iter().copied().filter(|name| has(name)).collect();
                if !on.is_empty() {
                    driver.update_features(spec, &on, false)?;
                }
                driver.update_features(spec, &["exclusive-lock"], false)?;
            }
            Self::LockOn if !has("exclusive-lock") => {
                driver.update_features(spec, &["exclusive-lock"], true)?;
            }
            _ => return Ok(Outcome::Pointless),
        }
        Ok(Outcome::Played)
    }

    fn migrate(self, world: &mut World) -> Result<Outcome> {
        let migrating = world.is_migrating()?;
        if migrating == (self == Self::Prepare) || self == Self::Prepare && !world.may_prepare() {
            return Ok(Outcome::Pointless);
        }
        world.tell(format!("{self:?}"));
        let layout = world.draw_layout().0;
        let (driver, spec) = (&world.store.driver, &world.spec);
        match self {
            Self::Prepare => driver.migration_prepare(spec, spec, &layout)?,
            Self::Execute => driver.migration_execute(spec)?,
            Self::Commit => driver.migration_commit(spec)?,
            _ => driver.migration_abort(spec)?,
        }
        world.migrated = true;
        Ok(Outcome::Played)
    }

    fn remove(self, world: &mut World) -> Result<Outcome> {
        let ours = world.pick_snapshot(|name| name.starts_with("rbd2qcow2-"))?;
        let (driver, spec) = (&world.store.driver, &world.spec);
        match (self, ours) {
            (Self::RemoveOurs, Some(ours)) => {
                world.told.push(format!("RemoveOurs {ours}"));
                driver.snap_remove(spec, &ours)?;
            }
            (Self::TrashOurs, Some(ours)) => {
                let clone = unique_image("scratch");
                world.told.push(format!("TrashOurs {ours}, which {} needs", clone.image));
                driver.clone(spec, &ours, &clone, &Layout::default())?;
                world.copies.push(clone);
                driver.snap_remove(spec, &ours)?;
            }
            (Self::TrashImage, _) => {
                world.told.push("TrashImage".to_owned());
                world.trashed = Some(driver.trash_move(spec)?);
            }
            (Self::DeepCopy, _) => {
                let copy = unique_image("copy");
                world.told.push(format!("DeepCopy to {}", copy.image));
                driver.close(spec)?;
                driver.deep_copy(spec, &copy)?;
                world.copies.push(copy.clone());
                world.to_back_up.push(copy);
            }
            _ => return Ok(Outcome::Pointless),
        }
        Ok(Outcome::Played)
    }
}

/// A writer that has heard of all snapshots but the newest. Only what can be found out is written: with
/// maps and a lock an object that nobody has, and anything in a snapshot that was taken without a lock.
fn stale_write(world: &mut World) -> Result<Outcome> {
    let info = world.store.driver.info(&world.spec, None)?;
    let objects = info.size.div_ceil(info.object_size * info.stripe_count) * info.stripe_count;
    let numbers = world.store.driver.snap_numbers(&world.spec)?;
    if objects == 0 || numbers.is_empty() {
        return Ok(Outcome::Pointless);
    }
    let object = world.random.below(objects);
    let newest = world.store.driver.snaps(&world.spec)?.pop();
    let is_ours = newest.is_some_and(|snap| snap.id == numbers[0] && snap.name.starts_with("rbd2qcow2-"));
    // What nobody backs up may change.
    let new_only = is_ours && world.locked;
    if new_only && !info.features.iter().any(|name| name == "object-map") {
        return Ok(Outcome::Pointless);
    }
    if new_only && world.store.driver.object_exists(&world.spec, object)? {
        return Ok(Outcome::Pointless);
    }
    // A client that fills an object of a clone copies all of it.
    let whole = info.overlap > 0 || world.random.one_in(2);
    let offset = if whole { 0 } else { world.random.below(info.object_size / 512) * 512 };
    let length = if whole { info.object_size } else { 512 };
    let seed = world.random.next();
    let known = &numbers[1..];
    let seq = known.first().copied().unwrap_or(0);
    world.tell(format!("StaleWrite object {object} {offset}+{length}, seed {seed}, all but {}", numbers[0]));
    world.store.driver.stale_write(&world.spec, object, offset, length, seed, seq, known)?;
    world.late = true;
    if new_only {
        // The writer goes on, and the head's map learns of the object. One that no map has only a scan finds.
        let start = world.random.below(info.object_size / 512) * 512;
        world.tell(format!("and 512 more at {start} in it"));
        world.store.driver.write_object(&world.spec, object, start, 512, seed.wrapping_add(1))?;
    }
    Ok(Outcome::Played)
}
