//! What tests on a cluster need: images, a destination, running programs, and the truth to compare
//! points with.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::cluster::TestCluster;
use crate::driver::{Driver, Layout, Spec};
use crate::mount::Mount;
use crate::program;

/// The longest that a test waits for anything. Only a hang takes as long.
pub const HANG: Duration = Duration::from_secs(90);

/// How long a stopped program may take where the cluster does not answer. Generous: the tests share
/// their machine. The times that are measured are printed.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

pub const MIB: u64 = 1 << 20;

/// What writes layers, as options.
pub const WRITERS: [&[&str]; 2] = [&["--writer", "native"], &["--writer", "qemu-nbd"]];

/// Options, and more of them.
pub fn with<'a>(some: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [some, more].concat()
}

/// A layer that takes so much of the disk holds data; an empty one has less than this in its tables.
const SOME_DATA: u64 = MIB;

/// A cluster, a client of it to write images with, and a destination.
#[derive(Debug)]
pub struct Rig {
    pub conf: PathBuf,
    pub driver: Driver,
    /// The destination's own file system, where it has one.
    pub mount: Option<Mount>,
    dest: TempDir,
    /// What points must hold: a raw copy of the image as it was, by its number.
    truths: TempDir,
}

impl Rig {
    pub fn new(cluster: &TestCluster) -> Self {
        let temporary = || TempDir::new().expect("a temporary directory");
        Self {
            conf: cluster.conf.clone(),
            driver: cluster.driver(),
            mount: None,
            dest: temporary(),
            truths: temporary(),
        }
    }

    /// The destination, as the program sees it.
    pub fn dest(&self) -> &Path {
        self.dest.path()
    }

    /// Where the points of an image with a plain name are.
    pub fn directory(&self, image: &Spec) -> PathBuf {
        let dest = self.mount.as_ref().map_or_else(|| self.dest().to_owned(), Mount::seen_from_outside);
        dest.join(&image.image)
    }

    /// Makes an image of `size` MiB, with data in every other MiB.
    pub fn image(&self, image: &Spec, size: u64, features: &'static [&'static str]) {
        self.driver.create(image, size * MIB, &Layout::new(22, features)).expect("created");
        for offset in (0..size).step_by(2) {
            self.driver.write(image, offset * MIB, MIB, offset).expect("written");
        }
        self.driver.close(image).expect("closed");
    }

    /// Changes a part of an image.
    pub fn change(&self, image: &Spec, offset: u64, length: u64, seed: u64) {
        self.driver.write(image, offset, length, seed).expect("written");
        self.driver.close(image).expect("closed");
    }

    /// Keeps what the image holds now.
    pub fn truth(&self, image: &Spec, number: usize) -> PathBuf {
        let path = self.truths.path().join(format!("{}-{number}.raw", image.image));
        self.driver.read_to(image, None, &path).expect("read");
        path
    }

    /// `rbd2qcow2 backup ARGUMENTS POOL DEST IMAGE`, not yet started.
    pub fn backup(&self, image: &Spec, arguments: &[&str]) -> Command {
        self.backup_to(self.dest(), &[image], arguments)
    }

    pub fn backup_to(&self, dest: &Path, images: &[&Spec], arguments: &[&str]) -> Command {
        let mut command = program::command();
        command.arg("-c").arg(&self.conf).arg("backup").args(arguments);
        command.arg(&images[0].pool).arg(dest).args(images.iter().map(|image| &image.image));
        self.mount.as_ref().map(|mount| mount.inside(&command)).unwrap_or(command)
    }

    /// A backup that has got into the middle of its copy: data is in the layer. The options must make
    /// it slow enough to stay there for a while.
    pub fn start_copy(&self, images: &[&Spec], arguments: &[&str]) -> Running {
        let mut running = Running::start(self.backup_to(self.dest(), images, arguments));
        wait_for("data in a layer", || {
            let copying = images.iter().any(|image| self.bytes_under_way(image) >= SOME_DATA);
            assert!(copying || !running.has_ended(), "ended before: {}", running.stderr.so_far());
            copying.then_some(())
        });
        running
    }

    /// What a layer that is not finished takes on the disk, in bytes.
    fn bytes_under_way(&self, image: &Spec) -> u64 {
        let names = names_in(&self.directory(image));
        let layers = names.iter().filter(|name| name.ends_with(".qcow2.partial"));
        // It may get its name, or be removed, meanwhile.
        let found = layers.filter_map(|name| self.directory(image).join(name).metadata().ok());
        found.map(|layer| layer.blocks() * 512).max().unwrap_or(0)
    }

    /// Backs an image up, which must succeed, and gives what it said.
    pub fn back_up(&self, image: &Spec, arguments: &[&str]) -> program::Run {
        let run = Running::start(self.backup(image, arguments)).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        run
    }

    /// The layers of an image in the order of their points.
    pub fn layers(&self, image: &Spec) -> Vec<PathBuf> {
        let names = names_in(&self.directory(image));
        let layers = names.iter().filter(|name| is_layer(name));
        layers.map(|name| self.directory(image).join(name)).collect()
    }

    /// Whether the directory holds complete points and the lock, and nothing else.
    pub fn assert_tidy(&self, image: &Spec) {
        let names = names_in(&self.directory(image));
        let mut expected = BTreeSet::from([".lock".to_owned()]);
        for layer in names.iter().filter(|name| is_layer(name)) {
            let stem = layer.trim_end_matches("qcow2");
            expected.extend(["qcow2", "json", "digests"].map(|suffix| format!("{stem}{suffix}")));
        }
        assert_eq!(names, expected, "in {}", self.directory(image).display());
    }

    /// The snapshots of an image, as the points that they are of; whole names where they are of none,
    /// such as those in the image's trash.
    pub fn snapshots(&self, image: &Spec) -> Vec<String> {
        let point = |name: &str| Some(name.strip_prefix("rbd2qcow2-")?.split_once('-')?.1.to_owned());
        let snapshots = self.driver.snaps(image).expect("listed").into_iter().map(|snapshot| snapshot.name);
        snapshots.map(|name| point(&name).unwrap_or(name)).collect()
    }

    /// Whether the newest point's snapshot is there, and no other; of an image without exclusive-lock the one
    /// before, too.
    pub fn assert_only_the_newest_snapshot(&self, image: &Spec) {
        let features = self.driver.info(image, None).expect("the image").features;
        let kept = if features.iter().any(|name| name == "exclusive-lock") { 1 } else { 2 };
        let points: Vec<_> = self.layers(image).iter().map(|layer| point_of(layer)).collect();
        assert_eq!(self.snapshots(image), points[points.len().saturating_sub(kept)..]);
    }

    /// Whether no process works in the destination any more: neither qemu-nbd nor the shell above it.
    pub fn assert_no_process(&self) {
        assert_none_left(|| self.processes());
    }

    /// Processes that work in the destination or have a file of it open, with their command lines. The
    /// shell above qemu-nbd does the one, qemu-nbd the other.
    fn processes(&self) -> BTreeMap<u32, String> {
        processes(|pid| match &self.mount {
            // Nobody outside of the namespace can.
            Some(mount) => mount.is_inhabitant(pid),
            None => works_in(self.dest(), pid),
        })
    }

    /// The states of all threads of these processes, as the letters that `ps` shows.
    pub fn thread_states(&self) -> String {
        let tasks = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let state = |task: std::fs::DirEntry| {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            status.split_once("\nState:\t").and_then(|(_, rest)| rest.chars().next())
        };
        self.processes().into_keys().flat_map(tasks).filter_map(state).collect()
    }

    /// The qemu-nbd that writes into the destination, once there is one.
    pub fn wait_for_qemu_nbd(&self) -> Pid {
        let is_server =
            |line: &str| line.split_whitespace().next().is_some_and(|name| name.ends_with("qemu-nbd"));
        let found = wait_for("qemu-nbd", || {
            self.processes().into_iter().find(|(_, line)| is_server(line)).map(|(pid, _)| pid)
        });
        Pid::from_raw(i32::try_from(found).expect("a pid")).expect("not 0")
    }
}

/// Whether no process works in `directory` any more, has a file of it open, or was told of one.
pub fn assert_no_process_in(directory: &Path) {
    let name = directory.to_str().expect("UTF-8");
    assert_none_left(|| processes(|pid| works_in(directory, pid) || command_line(pid).contains(name)));
}

fn assert_none_left(processes: impl Fn() -> BTreeMap<u32, String>) {
    let deadline = Instant::now() + STOP_LIMIT;
    loop {
        let left = processes();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "still running: {left:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The processes that are such, with their command lines.
fn processes(such: impl Fn(u32) -> bool) -> BTreeMap<u32, String> {
    let entries = std::fs::read_dir("/proc").expect("there is a /proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| such(pid)).map(|pid| (pid, command_line(pid))).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn works_in(directory: &Path, pid: u32) -> bool {
    let directory = directory.canonicalize().expect("the destination is there");
    let is_inside = |link: &Path| std::fs::read_link(link).is_ok_and(|place| place.starts_with(&directory));
    let process = PathBuf::from(format!("/proc/{pid}"));
    let mut files = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    is_inside(&process.join("cwd")) || files.any(|file| is_inside(&file.path()))
}

/// Whether a point reads as the image did, and its file is sound.
pub fn assert_point(layer: &Path, truth: &Path) {
    let name = layer.display();
    let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(layer).output();
    let check = check.expect("qemu-img is installed");
    assert!(check.status.success(), "qemu-img check {name}: {}", String::from_utf8_lossy(&check.stdout));
    // Where one is longer, zeroes would do for qemu-img.
    let mut header = [0; 32];
    std::fs::File::open(layer).and_then(|mut file| file.read_exact(&mut header)).expect("a header");
    let size = u64::from_be_bytes(header[24..].try_into().expect("8 bytes"));
    assert_eq!(size, truth.metadata().expect("it was written").len(), "the size of {name}");
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "qcow2"]).arg(truth).arg(layer);
    let compare = compare.output().expect("qemu-img is installed");
    assert!(compare.status.success(), "{name} differs: {}", String::from_utf8_lossy(&compare.stdout));
}

/// The point of a layer with a plain name.
pub fn point_of(layer: &Path) -> String {
    let stem = layer.file_stem().expect("a name").to_string_lossy().into_owned();
    stem.rsplit_once('@').expect("IMAGE@POINT").1.to_owned()
}

/// The names in a directory; none where there is no directory.
pub fn names_in(directory: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return BTreeSet::new() };
    // A file may be renamed meanwhile.
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn is_layer(name: &str) -> bool {
    !name.starts_with('.') && name.ends_with(".qcow2")
}

fn command_line(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

/// Looks until there is something to see.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + HANG;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "no {what} came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The program while it runs. Killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Mortal,
    stdout: Collector,
    stderr: Collector,
}

/// A process that does not outlive a test that fails.
#[derive(Debug)]
struct Mortal(Child);

impl Drop for Mortal {
    fn drop(&mut self) {
        // Not waited for: a disk may hold it that only comes back after this. Where it has ended, this
        // does nothing.
        let _ = self.0.kill();
    }
}

/// Collects what a program says, so that it never waits for us.
#[derive(Debug)]
struct Collector {
    text: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Collector {
    fn start(mut pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                shared.lock().expect("no panic").extend_from_slice(&buffer[..length]);
            }
        });
        Self { text, thread }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("no panic")).into_owned()
    }

    fn finish(self) -> String {
        self.thread.join().expect("no panic");
        String::from_utf8(self.text.lock().expect("no panic").clone()).expect("UTF-8")
    }
}

impl Running {
    /// Starts the program with both outputs collected.
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program was built for this test");
        let stdout = Collector::start(child.stdout.take().expect("piped"));
        let stderr = Collector::start(child.stderr.take().expect("piped"));
        Self { child: Mortal(child), stdout, stderr }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child.0), signal).expect("it was not waited for");
    }

    /// Number of the only process that it has started.
    pub fn child(&self) -> u32 {
        let own = self.child.0.id();
        let children: Vec<_> = processes(|pid| parent_of(pid) == Some(own)).into_keys().collect();
        let [child] = children[..] else { panic!("not one child: {children:?}") };
        child
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.0.try_wait().expect("our child").is_some()
    }

    /// Waits for the first line on its standard output.
    pub fn wait_for_line(&mut self) -> String {
        wait_for("line", || {
            let line = self.stdout.so_far().split_once('\n').map(|(line, _)| line.to_owned());
            assert!(line.is_some() || !self.has_ended(), "ended without a line: {}", self.stderr.so_far());
            line
        })
    }

    /// Waits until it said something on its standard error.
    pub fn wait_for_words(&mut self, words: &str) {
        wait_for(words, || {
            let said = self.stderr.so_far().contains(words);
            assert!(said || !self.has_ended(), "ended without {words:?}: {}", self.stderr.so_far());
            said.then_some(())
        });
    }

    /// Waits for its end.
    pub fn wait(self) -> program::Run {
        self.wait_status().1
    }

    /// Waits for its end, and tells how long that took.
    pub fn wait_timed(self) -> (program::Run, Duration) {
        let start = Instant::now();
        let run = self.wait();
        (run, start.elapsed())
    }

    /// Waits for its end, for longer than for others.
    pub fn wait_within(self, limit: Duration) -> program::Run {
        self.wait_status_within(limit).1
    }

    pub fn wait_status(self) -> (ExitStatus, program::Run) {
        self.wait_status_within(HANG)
    }

    /// Waits for its end; where that does not come, says where each thread of it is.
    fn wait_status_within(mut self, limit: Duration) -> (ExitStatus, program::Run) {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.0.try_wait().expect("our child") {
                break status;
            }
            if Instant::now() >= deadline {
                let threads = threads_of(self.child.0.id());
                self.signal(Signal::KILL);
                let (printed, said) = (self.stdout.so_far(), self.stderr.so_far());
                panic!("the program hangs; it printed {printed:?} and said {said:?}; its threads: {threads}");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let run = program::Run {
            status: status.code(),
            stdout: self.stdout.finish(),
            stderr: self.stderr.finish(),
        };
        (status, run)
    }

    /// Kills it, and tells whether it had not ended by itself before.
    pub fn kill(mut self) -> bool {
        // Who has looked whether it has ended has waited for it, too.
        if !self.has_ended() {
            self.signal(Signal::KILL);
        }
        let (status, run) = self.wait_status();
        assert!(status.signal() == Some(9) || status.success(), "{status}: {run:?}");
        status.signal() == Some(9)
    }
}

/// Names and states of a process's threads.
fn threads_of(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let line = |task: std::fs::DirEntry| {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        format!("{} in {}", read("comm").trim(), read("wchan").trim())
    };
    tasks.map(line).collect::<Vec<_>>().join("; ")
}
