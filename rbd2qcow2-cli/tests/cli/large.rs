//! An image with a large root and small points upon it, as `prune` likes them, without a cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};

use rbd2qcow2_core::chain::{Catalogue, ImageName};
use rbd2qcow2_core::layer::{Compression, ExtendedL2};
use tempfile::TempDir;

use crate::directory::{Backups, Form};
use crate::killed::Random;
use crate::program::{Run, command};
use crate::rig::{MIB, Running, assert_point, names_in, wait_for};

/// The image.
pub const IMAGE: &str = "vm";

/// Its size in bytes; all but the last [`EMPTY`] bytes hold data.
const SIZE: u64 = 104 * MIB;
const EMPTY: u64 = 8 * MIB;

/// How many points there are.
pub const POINTS: usize = 6;

/// What the layers may be.
pub const FORMS: [Form; 2] = [
    Form { compression: Compression::None, extended_l2: ExtendedL2::Auto },
    Form { compression: Compression::Zstd { level: None }, extended_l2: ExtendedL2::Auto },
];

/// What memory must have free for the chains to be made there.
const ROOM: u64 = 3 << 30;

/// A temporary directory, in memory where there is plenty of it: what is tested writes a lot, and most of it
/// does not depend on the disk.
pub fn scratch() -> TempDir {
    let shared = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shared).map_or(0, |found| found.f_bavail * found.f_frsize);
    let directory = if free >= ROOM { TempDir::new_in(shared) } else { TempDir::new() };
    directory.expect("a temporary directory")
}

/// Such an image once for each form, with what its points hold. Made once for all tests that run at a time,
/// never changed.
#[derive(Debug)]
pub struct Template {
    directory: TempDir,
    /// The names of the points, the oldest first.
    pub names: Vec<String>,
}

impl Template {
    pub fn get() -> Arc<Self> {
        static SHARED: Mutex<Weak<Template>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let made = Arc::new(Self::new());
            *shared = Arc::downgrade(&made);
            made
        })
    }

    fn new() -> Self {
        let mut template = Self { directory: scratch(), names: Vec::new() };
        for number in 0..FORMS.len() {
            fs::create_dir(template.chain(number)).unwrap();
        }
        let mut random = Random::new(0x1234_5678);
        let (mut content, mut base) = (Vec::new(), None);
        for number in 0..POINTS {
            match base {
                None => content = root(&mut random),
                Some(_) => change(&mut content, &mut random),
            }
            let (name, time) = name_and_time(number);
            for (number, form) in FORMS.into_iter().enumerate() {
                Backups::at(template.chain(number)).fill_as(form, IMAGE, &time, &content, base.as_deref());
            }
            fs::write(template.truth(&name), &content).unwrap();
            template.names.push(name);
            base = Some(content.clone());
        }
        template
    }

    /// The destination whose layers have this form.
    fn chain(&self, form: usize) -> PathBuf {
        self.directory.path().join(format!("chain-{form}"))
    }

    fn truth(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.raw"))
    }
}

/// The name of a point, and the time that it means.
fn name_and_time(number: usize) -> (String, String) {
    let day = number + 1;
    assert!(day < 31, "so many days has that month");
    (format!("202512{day:02}T020000Z"), format!("2025-12-{day:02}T02:00:00Z"))
}

/// Data of which the one half can be packed and the other cannot; no two blocks are alike.
fn root(random: &mut Random) -> Vec<u8> {
    let mut cluster = Vec::with_capacity(1 << 16);
    while cluster.len() < 1 << 16 {
        let number = random.next().to_le_bytes();
        cluster.extend_from_slice(&number);
        cluster.extend_from_slice(&[number[0]; 8]);
    }
    let mut content = cluster.repeat((SIZE - EMPTY) as usize >> 16);
    for block in content.chunks_exact_mut(4096) {
        block[..8].copy_from_slice(&random.next().to_le_bytes());
    }
    content.resize(SIZE as usize, 0);
    content
}

/// What happens between two backups: a file is written, one is deleted, and some are touched.
fn change(content: &mut [u8], random: &mut Random) {
    let mut write = |at: u64, length: u64, random: &mut Random| {
        for byte in &mut content[at as usize..(at + length) as usize] {
            *byte = random.next() as u8;
        }
    };
    for _ in 0..24 {
        write(random.below(SIZE / 4096) * 4096, 4096, random);
    }
    // Not along any borders.
    write(random.below(SIZE - MIB), 700_000, random);
    write(random.below(SIZE - MIB), 5000, random);
    for length in [70_000, 400_000, 8192] {
        let at = random.below(SIZE - MIB) as usize;
        content[at..at + length].fill(0);
    }
}

/// An image that a test may prune. It is a copy of the template's.
#[derive(Debug)]
pub struct Chain {
    pub backups: Backups,
    template: Arc<Template>,
    form: usize,
    /// What has been added since.
    added: BTreeMap<String, PathBuf>,
    truths: TempDir,
}

impl Chain {
    /// In a directory of its own.
    pub fn new(form: usize) -> Self {
        Self::copied(form, Backups::with(scratch()))
    }

    /// In a directory that is there.
    pub fn at(form: usize, directory: PathBuf) -> Self {
        Self::copied(form, Backups::at(directory))
    }

    fn copied(form: usize, backups: Backups) -> Self {
        let chain =
            Self { backups, template: Template::get(), form, added: BTreeMap::new(), truths: scratch() };
        let from = Backups::at(chain.template.chain(form)).image(IMAGE);
        fs::create_dir_all(chain.directory()).unwrap();
        for name in names_in(&from).iter().filter(|name| !name.starts_with('.')) {
            fs::copy(from.join(name), chain.directory().join(name)).unwrap();
        }
        chain
    }

    pub fn directory(&self) -> PathBuf {
        self.backups.image(IMAGE)
    }

    /// The names of all points that there have ever been, the oldest first.
    pub fn names(&self) -> Vec<String> {
        self.template.names.iter().chain(self.added.keys()).cloned().collect()
    }

    /// What a point must hold.
    pub fn truth(&self, name: &str) -> PathBuf {
        self.added.get(name).cloned().unwrap_or_else(|| self.template.truth(name))
    }

    pub fn layer(&self, name: &str) -> PathBuf {
        self.directory().join(format!("{IMAGE}@{name}.qcow2"))
    }

    pub fn inode(&self, name: &str) -> u64 {
        self.layer(name).metadata().unwrap().ino()
    }

    /// The points that are there.
    pub fn points(&self) -> Vec<String> {
        let names = names_in(&self.directory());
        let layers = names.iter().filter(|name| !name.starts_with('.'));
        let points = layers.filter_map(|name| name.strip_prefix("vm@")?.strip_suffix(".qcow2"));
        points.map(str::to_owned).collect()
    }

    /// The hidden files, but for the lock.
    pub fn hidden(&self) -> BTreeSet<String> {
        let mut names = names_in(&self.directory());
        names.retain(|name| name.starts_with('.') && name != ".lock");
        names
    }

    /// A command on the destination, which is at `dest` for whoever runs it.
    pub fn command_at(dest: &Path, words: &[&str]) -> Command {
        let (name, args) = words.split_first().unwrap();
        let mut command = command();
        command.arg(name).arg(dest).args(args);
        command
    }

    pub fn command(&self, words: &[&str]) -> Command {
        Self::command_at(self.backups.path(), words)
    }

    pub fn run(&self, words: &[&str]) -> Run {
        self.command(words).output().unwrap().into()
    }

    /// Adds a point as a backup does.
    pub fn back_up(&mut self, random: &mut Random) {
        let names = self.names();
        let base = fs::read(self.truth(names.last().unwrap())).unwrap();
        let mut content = base.clone();
        change(&mut content, random);
        let (name, time) = name_and_time(names.len());
        self.backups.fill_as(FORMS[self.form], IMAGE, &time, &content, Some(&base));
        let truth = self.truths.path().join(&name);
        fs::write(&truth, content).unwrap();
        self.added.insert(name, truth);
    }

    /// Every point that is there reads as it should, by stock QEMU, and these are among them.
    pub fn assert_points(&self, must: &[String]) {
        let there = self.points();
        assert!(must.iter().all(|name| there.contains(name)), "{must:?} must be among {there:?}");
        there.iter().for_each(|name| assert_point(&self.layer(name), &self.truth(name)));
    }

    pub fn assert_verified(&self) {
        let told = self.run(&["verify"]);
        assert_eq!(told.status, Some(0), "{told:?}");
        assert_eq!(told.stdout.matches(": ok, ").count(), self.points().len(), "{told:?}");
    }

    /// These points are there, whole, and nothing else is.
    pub fn assert_only(&self, points: &[String]) {
        assert_eq!(self.points(), points);
        assert_eq!(names_in(&self.directory()).len(), 1 + 3 * points.len(), "{:?}", self.hidden());
        self.assert_points(points);
        self.assert_verified();
    }

    /// How far a prune has come.
    pub fn reached(&self) -> Reached {
        let names = names_in(&self.directory());
        let catalogue = Catalogue::read(&self.directory(), &ImageName::new(IMAGE).unwrap()).unwrap();
        let base = catalogue.points().iter().find_map(|point| point.base);
        match base {
            Some(base) if catalogue.point(base).is_some() => Reached::OntoBase,
            Some(_) => Reached::Waiting,
            None if names.iter().any(|name| name.ends_with(".base")) => Reached::BaseNamed,
            None if self.hidden().is_empty() && self.points().len() == self.names().len() => Reached::Nothing,
            None if self.hidden().is_empty() => Reached::Done,
            None => Reached::Other,
        }
    }
}

/// How far a prune has come that was cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    Nothing,
    /// The layer that is to be reused has its second name.
    BaseNamed,
    /// The layers above it are one, upon that name.
    OntoBase,
    /// The point is gone, and the layer waits to take its child's place.
    Waiting,
    /// It has done so, or the merge is of another kind.
    Other,
    /// All is done, or has not begun again.
    Done,
}

/// A stock qemu-nbd that has opened a point, and goes with this.
#[derive(Debug)]
pub struct Reader {
    _server: Running,
    place: TempDir,
}

impl Reader {
    /// Opens a layer and all below it. `None` where it could not, because one was renamed or removed while it
    /// went from one to the next.
    pub fn open(layer: &Path) -> Option<Self> {
        let place = TempDir::new().expect("a temporary directory");
        let mut server = Command::new("qemu-nbd");
        server.args(["--read-only", "--persistent", "--shared=4", "--format=qcow2", "--socket"]);
        let mut server = Running::start({
            server.arg(place.path().join("nbd")).arg(layer);
            server
        });
        // It listens before it has opened anything, and answers when it has.
        let mut list = Command::new("qemu-nbd");
        list.args(["--list", "--socket"]).arg(place.path().join("nbd"));
        let open = wait_for("answer of qemu-nbd", || match server.has_ended() {
            true => Some(false),
            false => list.output().expect("qemu-nbd is installed").status.success().then_some(true),
        });
        if open {
            return Some(Self { _server: server, place });
        }
        let run = server.wait();
        assert!(run.stderr.contains("No such file or directory"), "{run:?}");
        None
    }

    /// It reads what it should.
    pub fn assert_reads(&self, truth: &Path, context: &str) {
        let uri = format!("nbd+unix:///?socket={}", self.place.path().join("nbd").display());
        assert!(compare(&uri, truth), "{context}: who had it open reads something else than {truth:?}");
    }
}

/// Whether stock QEMU reads there what the file holds.
pub fn compare(uri: &str, truth: &Path) -> bool {
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-q", "-f", "raw", "-F", "raw"]).arg(truth).arg(uri);
    compare.status().expect("qemu-img is installed").success()
}

/// What stock QEMU reads of a layer and those below it, by way of a file; or what it says.
pub fn convert(layer: &Path, raw: &Path) -> Result<Vec<u8>, String> {
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(layer).arg(raw);
    let output = convert.output().expect("qemu-img is installed");
    match output.status.success() {
        true => Ok(fs::read(raw).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
