//! An image, those that it depends on, and what is known of them.

use super::steps::{Step, Theme};
use super::tally::Tally;
use crate::cluster::{TestCluster, say, unique_image};
use crate::driver::{Layout, Result, Spec};
use crate::random::Random;
use crate::store::Store;

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Played,
    /// It makes no sense now.
    Pointless,
}

pub struct World {
    pub store: Store,
    pub spec: Spec,
    /// Parent, grandparent: those that are still there.
    pub ancestors: Vec<Spec>,
    pub theme: Theme,
    pub random: Random,
    pub told: Vec<String>,
    pub tally: Tally,
    /// The id of the image while it is in the trash.
    pub trashed: Option<String>,
    /// Copies and clones, to be removed at the end, and those of them to be backed up once.
    pub copies: Vec<Spec>,
    pub to_back_up: Vec<Spec>,
    /// Something was written with an old context since this was last reset.
    pub late: bool,
    /// The newest snapshot of a run was taken with an exclusive lock: nobody writes into it.
    pub locked: bool,
    /// A step of a migration was played since this was last reset.
    pub migrated: bool,
    /// When steps are being played: `between`, or the stage of a run.
    pub moment: String,
    /// Steps that were played in this run, and since the beginning.
    pub now: Vec<Step>,
    pub ever: Vec<Step>,
    taken: u64,
    order: u8,
}

const FULL: &[&str] = &["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"];
const SHALLOW: &[&str] = &["layering", "exclusive-lock", "object-map", "fast-diff"];
const NO_MAP: &[&str] = &["layering", "exclusive-lock", "deep-flatten"];
const NO_LOCK: &[&str] = &["layering"];

impl World {
    /// Makes the images.
    pub fn make(cluster: &TestCluster, theme: Theme, mut random: Random, told: Vec<String>) -> Result<Self> {
        let order = random.pick(&[12, 14, 16, 16, 18, 20]);
        let mut world = Self {
            store: Store::new(cluster),
            spec: unique_image("history"),
            ancestors: Vec::new(),
            theme,
            random,
            told,
            tally: Tally::default(),
            trashed: None,
            copies: Vec::new(),
            to_back_up: Vec::new(),
            late: false,
            locked: true,
            migrated: false,
            moment: "between".to_owned(),
            now: Vec::new(),
            ever: Vec::new(),
            taken: 0,
            order,
        };
        let generations = match theme {
            Theme::Ancestors => 1 + world.random.below(2),
            // An image that migrates has a parent anyhow.
            Theme::Migration => 0,
            _ => world.random.below(4).saturating_sub(1),
        };
        let mut above: Option<Spec> = None;
        for generation in (0..=generations).rev() {
            let spec = if generation == 0 { world.spec.clone() } else { unique_image("ancestor") };
            let (layout, _) = world.draw_layout();
            let size = world.draw_size().max(1 << 18);
            world.tell(format!("{}: {size} bytes, {layout:?}, of {above:?}", spec.image));
            let driver = &world.store.driver;
            match &above {
                None => driver.create(&spec, size, &layout)?,
                Some(parent) => driver.clone(parent, "base", &spec, &layout)?,
            }
            for _ in 0..3 {
                let at = world.random.below(size);
                let length =
                    (1 + world.random.below(size / 2)).min(driver.info(&spec, None)?.size.saturating_sub(at));
                driver.write(&spec, at.min(size), length, world.random.next())?;
            }
            if generation > 0 {
                driver.snap_create(&spec, "base")?;
                driver.close(&spec)?;
                world.ancestors.insert(0, spec.clone());
            }
            above = Some(spec);
        }
        Ok(world)
    }

    pub fn tell(&mut self, what: String) {
        self.told.push(format!("    {}: {what}", self.moment));
    }

    pub fn draw_layout(&mut self) -> (Layout, u64) {
        let features = match self.theme {
            Theme::Ordinary | Theme::Removals => self.random.pick(&[FULL, FULL, SHALLOW, NO_MAP, NO_LOCK]),
            Theme::Ancestors => self.random.pick(&[FULL, FULL, SHALLOW, NO_MAP]),
            Theme::Maps => self.random.pick(&[FULL, NO_MAP, NO_MAP]),
            Theme::Stale => self.random.pick(&[FULL, SHALLOW]),
            Theme::StaleWithoutLock => NO_LOCK,
            Theme::Migration => self.random.pick(&[FULL, FULL, NO_MAP]),
        };
        let object = 1 << self.order;
        let layout = Layout::new(self.order, features);
        if self.random.one_in(6) {
            let unit = object / self.random.pick(&[1, 2]);
            return (layout.striped(unit, 2 + self.random.below(3)), object);
        }
        (layout, object)
    }

    /// A size for the image: many objects make slow rounds.
    pub fn draw_size(&mut self) -> u64 {
        let most: u64 = match self.order {
            12 => 1 << 20,
            14 => 2 << 20,
            _ => 5 << 20,
        };
        match self.random.below(4) {
            0 => most,
            1 => most / 2 + self.random.below(most / 2),
            2 => (most / 4 + self.random.below(most / 2)) / 4096 * 4096,
            _ => self.random.below(most),
        }
    }

    pub fn size(&self) -> Result<u64> {
        Ok(self.store.driver.info(&self.spec, None)?.size)
    }

    /// Objects, a part of one, sectors, or anything.
    pub fn range(&mut self) -> Result<(u64, u64)> {
        let (size, object) = (self.size()?, 1 << self.order);
        let random = &mut self.random;
        let start = random.below(size.max(1)) / object * object;
        let inside = random.below(object);
        let (offset, length) = match random.below(6) {
            0 => (start, object),
            1 => (start, object * (1 + random.below(6))),
            2 => (start + inside, object - inside),
            3 => (start, inside + 1),
            4 => (start + inside / 512 * 512, 512 << random.below(6)),
            _ => (start + inside, 1 + random.below(object * 3)),
        };
        let offset = offset.min(size);
        Ok((offset, length.min(size - offset).min(1 << 20)))
    }

    pub fn is_migrating(&self) -> Result<bool> {
        Ok(self.store.driver.info(&self.spec, None)?.features.iter().any(|name| name == "migrating"))
    }

    /// A snapshot that a run has taken before the preparation, and removes after it, takes every writer
    /// with it.
    pub fn may_prepare(&self) -> bool {
        ["between", "Prepare", "Snapshot", "CleanUp"].contains(&&*self.moment)
    }

    pub fn snapshot(&mut self) -> Result<()> {
        let name = format!("user-{}", self.taken);
        self.taken += 1;
        self.tell(format!("snapshot {name}"));
        self.store.driver.snap_create(&self.spec, &name).map(drop)
    }

    pub fn pick_snapshot(&mut self, which: impl Fn(&str) -> bool) -> Result<Option<String>> {
        let mut snaps = self.store.driver.snaps(&self.spec)?;
        snaps.retain(|snap| which(&snap.name));
        if snaps.is_empty() {
            return Ok(None);
        }
        let index = self.random.below(snaps.len() as u64) as usize;
        Ok(Some(snaps.swap_remove(index).name))
    }

    /// Draws a step and plays it. What the cluster refuses was not played.
    pub fn step(&mut self) -> Result<()> {
        if self.trashed.is_some() {
            return Ok(());
        }
        let step = Step::draw(self);
        match step.play(self) {
            Ok(Outcome::Played) => {
                self.tally.count(format!("steps/{step:?}/{}", self.moment));
                self.now.push(step);
                self.ever.push(step);
                Ok(())
            }
            Ok(Outcome::Pointless) => Ok(()),
            Err(error) if error.is_breakdown() => Err(error),
            Err(error) => {
                // It may have been played in part.
                self.now.push(step);
                self.ever.push(step);
                self.tell(format!("{step:?}: {error}"));
                self.tally.count(format!("refused/{step:?}/{}", error.errno().unwrap_or_default()));
                Ok(())
            }
        }
    }

    /// Takes the image out of the trash.
    pub fn restore_from_trash(&mut self) -> Result<()> {
        match self.trashed.take() {
            Some(id) => self.store.driver.trash_restore(&self.spec, &id),
            None => Ok(()),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&self.told.join("\n"));
        }
    }
}
