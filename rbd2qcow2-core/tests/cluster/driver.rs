//! An independent client of the cluster: a child process on Debian's python3-rbd that makes, writes
//! and reads the images that tests are about.
//!
//! It holds images open between commands, as a virtual machine does, with the exclusive lock where
//! they have one. What must not find them in use calls [`Driver::close`] first.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// What the child runs.
const SCRIPT: &str = include_str!("driver.py");

/// Debian's interpreter: python3-rbd is built for it, whichever python3 comes first in PATH.
const PYTHON: &str = "/usr/bin/python3";

/// The longest wait for one answer. librbd hangs now and then; no command of a test takes as long.
const LIMIT: Duration = Duration::from_secs(120);

/// Features of an image with everything that a diff could use.
pub const FULL_FEATURES: &[&str] = &["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"];
/// Features of an image that has no object map.
pub const NO_OBJECT_MAP: &[&str] = &["layering", "exclusive-lock", "deep-flatten"];

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The cluster, or python3-rbd, said no.
    #[error("{command} was refused: {error}")]
    Refused { command: String, error: String, errno: Option<i32> },
    /// The child is gone, or could not start; librbd takes its process down now and then.
    #[error("the driver died during {command} ({status}); it said: {stderr}")]
    Died { command: String, status: String, stderr: String },
    /// The child did not answer and was killed.
    #[error("the driver did not answer {command} within {} s and was killed", LIMIT.as_secs())]
    Hung { command: String },
}

impl DriverError {
    /// The cluster's error number, where it said no.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => *errno,
            Self::Died { .. } | Self::Hung { .. } => None,
        }
    }

    /// Whether the second client broke, which says nothing about what is under test.
    pub fn is_breakdown(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

pub type Result<T> = std::result::Result<T, DriverError>;

/// The full name of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spec {
    pub pool: String,
    /// Empty for the default one.
    pub namespace: String,
    pub image: String,
}

impl Spec {
    pub fn new(pool: &str, image: &str) -> Self {
        Self { pool: pool.to_owned(), namespace: String::new(), image: image.to_owned() }
    }

    pub fn in_namespace(pool: &str, namespace: &str, image: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..Self::new(pool, image) }
    }
}

/// How an image is laid out. `Default` is what librbd does by default.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Binary logarithm of the object size: 12 (4 KiB) to 25.
    pub order: Option<u8>,
    /// Names as `rbd info` prints them.
    pub features: Option<&'static [&'static str]>,
    /// Stripe unit in bytes, and stripe count. The striping feature comes with it.
    pub stripe: Option<(u64, u64)>,
}

impl Layout {
    pub fn new(order: u8, features: &'static [&'static str]) -> Self {
        Self { order: Some(order), features: Some(features), stripe: None }
    }

    pub fn striped(self, unit: u64, count: u64) -> Self {
        Self { stripe: Some((unit, count)), ..self }
    }

    /// The arguments of `create` and `clone`: the layout, and `more`.
    fn with(&self, mut more: Value) -> Value {
        more["order"] = json!(self.order);
        more["features"] = json!(self.features.map(|features| {
            let striping = self.stripe.filter(|stripe| stripe.1 > 1).map(|_| "striping");
            features.iter().copied().chain(striping).collect::<Vec<_>>()
        }));
        more["stripe_unit"] = json!(self.stripe.map(|stripe| stripe.0));
        more["stripe_count"] = json!(self.stripe.map(|stripe| stripe.1));
        more
    }
}

/// An image's properties at its head or at a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Info {
    pub id: String,
    pub size: u64,
    pub object_size: u64,
    pub stripe_unit: u64,
    pub stripe_count: u64,
    /// Names as `rbd info` prints them.
    pub features: Vec<String>,
    pub overlap: u64,
    /// Pool, image and snapshot.
    pub parent: Option<[String; 3]>,
    pub object_map_invalid: bool,
    pub fast_diff_invalid: bool,
}

/// A snapshot, as its image lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Snap {
    pub id: u64,
    pub size: u64,
    pub name: String,
}

/// The child process. It ends when this is dropped or its parent dies.
#[derive(Debug)]
pub struct Driver {
    /// One command at a time.
    child: Mutex<Process>,
    /// The cluster's configuration file.
    conf: PathBuf,
    /// What the child says on its stderr.
    stderr: NamedTempFile,
}

#[derive(Debug)]
struct Process {
    child: Child,
    /// `None` once there is nobody to talk to.
    stdin: Option<ChildStdin>,
    answers: Receiver<String>,
}

impl Driver {
    /// Starts a client of the cluster that the configuration file describes.
    pub fn start(conf: &Path) -> Result<Self> {
        let stderr = NamedTempFile::new().expect("a temporary file");
        let child = Mutex::new(Process::start(&stderr));
        let driver = Self { child, conf: conf.to_owned(), stderr };
        driver.connect()?;
        Ok(driver)
    }

    fn child(&self) -> MutexGuard<'_, Process> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self) -> Result<()> {
        self.act("connect", json!({ "conf": self.conf }))
    }

    /// Sends a command and waits for its answer.
    fn run(&self, name: &str, mut request: Value) -> Result<Value> {
        request["do"] = json!(name);
        let line = request.to_string();
        let shown = || match line.char_indices().nth(300) {
            Some((end, _)) => format!("{}...", &line[..end]),
            None => line.clone(),
        };
        let mut process = self.child();
        // A write that fails means that the child is gone, which the wait for its answer notices.
        let _ = process.stdin.as_mut().map(|stdin| stdin.write_all(format!("{line}\n").as_bytes()));
        match process.answers.recv_timeout(LIMIT) {
            Ok(answer) => {
                let mut answer: Value = serde_json::from_str(&answer)
                    .unwrap_or_else(|error| panic!("the driver answered {answer:?}: {error}"));
                match answer["error"].as_str() {
                    None => Ok(answer["ok"].take()),
                    Some(error) => Err(DriverError::Refused {
                        command: shown(),
                        error: error.to_owned(),
                        errno: answer["errno"].as_i64().and_then(|errno| i32::try_from(errno).ok()),
                    }),
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                process.kill();
                Err(DriverError::Hung { command: shown() })
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = process.kill();
                Err(DriverError::Died { command: shown(), status, stderr: self.said() })
            }
        }
    }

    /// The end of what the child said on its stderr.
    fn said(&self) -> String {
        let mut bytes = Vec::new();
        let read = self.stderr.reopen().and_then(|mut file| {
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(4096)))?;
            file.read_to_end(&mut bytes)
        });
        match read {
            Ok(0) => "nothing".to_owned(),
            Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// The same for a command that has nothing to answer.
    fn act(&self, name: &str, request: Value) -> Result<()> {
        self.run(name, request).map(drop)
    }

    /// The same for a command that answers with a value.
    fn ask<T: for<'a> Deserialize<'a>>(&self, name: &str, request: Value) -> Result<T> {
        let answer = self.run(name, request)?;
        let value = serde_json::from_value(answer.clone());
        Ok(value.unwrap_or_else(|error| panic!("the driver answered {name} with {answer}: {error}")))
    }

    /// The same for a command that only looks: where the child broke down over it, a new one is asked.
    fn look<T: for<'a> Deserialize<'a>>(&self, name: &str, request: Value) -> Result<T> {
        match self.ask(name, request.clone()) {
            Err(error) if error.is_breakdown() => {
                crate::cluster::say(&format!("the second client is started anew: {error}"));
                *self.child() = Process::start(&self.stderr);
                self.connect()?;
                self.ask(name, request)
            }
            answer => answer,
        }
    }

    /// Freezes the child: it keeps its images open, and answers nobody. See [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.child().signal("-STOP");
    }

    /// Lets the child go on.
    pub fn thaw(&self) {
        self.child().signal("-CONT");
    }

    /// Kills the child, as librbd does now and then.
    pub fn kill(&self) {
        self.child().kill();
    }

    // --- Pools

    /// The cluster's id.
    pub fn fsid(&self) -> Result<String> {
        self.ask("fsid", json!({}))
    }

    /// Sends a command, JSON with its `prefix`, to the monitors; gives what they answer.
    pub fn mon_command(&self, command: &Value) -> Result<Value> {
        self.run("mon_command", json!({ "command": command }))
    }

    /// Makes a pool for images.
    pub fn pool_create(&self, pool: &str) -> Result<()> {
        self.act("pool_create", json!({ "pool": pool, "pg_num": 8 }))
    }

    /// Removes a pool with all that is in it.
    pub fn pool_remove(&self, pool: &str) -> Result<()> {
        self.act("pool_remove", json!({ "pool": pool }))
    }

    pub fn namespace_create(&self, pool: &str, namespace: &str) -> Result<()> {
        self.act("namespace_create", json!({ "pool": pool, "namespace": namespace }))
    }

    /// Removes a namespace that holds no image.
    pub fn namespace_remove(&self, pool: &str, namespace: &str) -> Result<()> {
        self.act("namespace_remove", json!({ "pool": pool, "namespace": namespace }))
    }

    /// The names of a pool's images, sorted.
    pub fn images(&self, pool: &str, namespace: &str) -> Result<Vec<String>> {
        self.look("images", json!({ "pool": pool, "namespace": namespace }))
    }

    // --- Images

    /// Makes an image of `size` bytes.
    pub fn create(&self, spec: &Spec, size: u64, layout: &Layout) -> Result<()> {
        self.act("create", layout.with(json!({ "spec": spec, "size": size })))
    }

    /// Makes `child` a clone of a parent's snapshot, which need not be protected.
    pub fn clone(&self, parent: &Spec, snapshot: &str, child: &Spec, layout: &Layout) -> Result<()> {
        let mut layout = layout.clone();
        // A clone would take its parent's stripe unit, which may be more than its own object size.
        layout.stripe = layout.stripe.or(layout.order.map(|order| (1 << order, 1)));
        self.act("clone", layout.with(json!({ "parent": parent, "snapshot": snapshot, "spec": child })))
    }

    /// Copies into a clone all that it shows of its parent, which it then has no more.
    pub fn flatten(&self, spec: &Spec) -> Result<()> {
        self.act("flatten", json!({ "spec": spec }))
    }

    /// Removes an image that has no snapshots.
    pub fn remove(&self, spec: &Spec) -> Result<()> {
        self.act("remove", json!({ "spec": spec, "purge": false }))
    }

    /// Removes an image with its snapshots, protected ones too.
    pub fn purge(&self, spec: &Spec) -> Result<()> {
        self.act("remove", json!({ "spec": spec, "purge": true }))
    }

    /// Gives an image another name in its namespace.
    pub fn rename(&self, spec: &Spec, name: &str) -> Result<()> {
        self.act("rename", json!({ "spec": spec, "name": name }))
    }

    /// Lets go of an image: no watch and no lock of this client is left on it.
    pub fn close(&self, spec: &Spec) -> Result<()> {
        self.act("close", json!({ "spec": spec }))
    }

    /// Lets go of all images.
    pub fn close_all(&self) -> Result<()> {
        self.act("close_all", json!({}))
    }

    /// The properties at a snapshot, or at the head.
    pub fn info(&self, spec: &Spec, snapshot: Option<&str>) -> Result<Info> {
        self.look("info", json!({ "spec": spec, "snapshot": snapshot }))
    }

    /// Grows or shrinks an image.
    pub fn resize(&self, spec: &Spec, size: u64) -> Result<()> {
        self.act("resize", json!({ "spec": spec, "size": size }))
    }

    /// Does not open the image for writing, so that it is not in use afterwards.
    pub fn metadata(&self, spec: &Spec) -> Result<BTreeMap<String, String>> {
        self.look("metadata", json!({ "spec": spec }))
    }

    /// The value of one key, `None` where it is not set.
    pub fn metadata_get(&self, spec: &Spec, key: &str) -> Result<Option<String>> {
        self.ask("metadata_get", json!({ "spec": spec, "key": key }))
    }

    pub fn metadata_set(&self, spec: &Spec, key: &str, value: &str) -> Result<()> {
        self.act("metadata_set", json!({ "spec": spec, "key": key, "value": value }))
    }

    pub fn metadata_remove(&self, spec: &Spec, key: &str) -> Result<()> {
        self.act("metadata_remove", json!({ "spec": spec, "key": key }))
    }

    /// The addresses of the clients that have the image open for writing, this one included.
    pub fn watchers(&self, spec: &Spec) -> Result<Vec<String>> {
        self.ask("watchers", json!({ "spec": spec }))
    }

    /// Has the cluster take a client for dead at once, not after 30 s.
    pub fn blocklist(&self, address: &str) -> Result<()> {
        let command = json!({"prefix": "osd blocklist", "blocklistop": "add", "addr": address});
        self.mon_command(&command).map(drop)
    }

    /// Switches features on or off.
    pub fn update_features(&self, spec: &Spec, features: &[&str], enabled: bool) -> Result<()> {
        self.act("update_features", json!({ "spec": spec, "features": features, "enabled": enabled }))
    }

    /// Makes the object maps of the head and of all snapshots invalid, and leaves them switched on.
    pub fn invalidate_object_maps(&self, spec: &Spec) -> Result<()> {
        let features = ["object-map", "fast-diff"];
        self.update_features(spec, &features, false)?;
        // librbd makes new maps and marks them as not yet built.
        self.update_features(spec, &features, true)
    }

    /// Builds the object map of the head or of a snapshot, and makes it valid.
    pub fn rebuild_object_map(&self, spec: &Spec, snapshot: Option<&str>) -> Result<()> {
        self.act("rebuild_object_map", json!({ "spec": spec, "snapshot": snapshot }))
    }

    // --- Copies, trash, migration

    /// Copies an image with all its snapshots to one that is not there yet.
    pub fn deep_copy(&self, spec: &Spec, to: &Spec) -> Result<()> {
        self.act("deep_copy", json!({ "spec": spec, "to": to }))
    }

    /// Moves an image to the trash and gives its id.
    pub fn trash_move(&self, spec: &Spec) -> Result<String> {
        self.ask("trash_move", json!({ "spec": spec }))
    }

    /// Takes an image out of the trash, under the name in `spec`.
    pub fn trash_restore(&self, spec: &Spec, id: &str) -> Result<()> {
        self.act("trash_restore", json!({ "spec": spec, "id": id }))
    }

    /// Removes an image that is in the trash; it must have no snapshot.
    pub fn trash_remove(&self, spec: &Spec, id: &str) -> Result<()> {
        self.act("trash_remove", json!({ "spec": spec, "id": id }))
    }

    /// Begins to move an image to `to`, which may be itself: then it gets another id. Nobody may have it
    /// open for writing, the driver itself closes it.
    ///
    /// A snapshot that is there now must stay until the migration is committed: without it librbd aborts
    /// the process of whoever writes to the image, the driver too.
    pub fn migration_prepare(&self, spec: &Spec, to: &Spec, layout: &Layout) -> Result<()> {
        self.act("migration_prepare", layout.with(json!({ "spec": spec, "to": to })))
    }

    /// Copies what is still in the source. `spec`: what the image was prepared to become.
    pub fn migration_execute(&self, spec: &Spec) -> Result<()> {
        self.act("migration_execute", json!({ "spec": spec }))
    }

    /// Removes the source, all of which was copied.
    pub fn migration_commit(&self, spec: &Spec) -> Result<()> {
        self.act("migration_commit", json!({ "spec": spec }))
    }

    /// Removes the new image; the source is what it was at the preparation.
    pub fn migration_abort(&self, spec: &Spec) -> Result<()> {
        self.act("migration_abort", json!({ "spec": spec }))
    }

    /// Compares the object map of the head or of a snapshot with the objects. Where it is wrong, it becomes
    /// invalid; what [`info`](Self::info) then says.
    pub fn check_object_map(&self, spec: &Spec, snapshot: Option<&str>) -> Result<()> {
        self.act("check_object_map", json!({ "spec": spec, "snapshot": snapshot }))
    }

    /// The names of the images that need one of this image's snapshots.
    pub fn children(&self, spec: &Spec) -> Result<Vec<String>> {
        self.ask("children", json!({ "spec": spec }))
    }

    // --- Content

    /// Writes bytes without any pattern, none of which two seeds have in common.
    pub fn write(&self, spec: &Spec, offset: u64, length: u64, seed: u64) -> Result<()> {
        self.act("write", json!({ "spec": spec, "offset": offset, "length": length, "seed": seed }))
    }

    /// Writes one byte over and over.
    pub fn fill(&self, spec: &Spec, offset: u64, length: u64, byte: u8) -> Result<()> {
        self.act("fill", json!({ "spec": spec, "offset": offset, "length": length, "byte": byte }))
    }

    /// Writes these very bytes.
    pub fn write_bytes(&self, spec: &Spec, offset: u64, bytes: &[u8]) -> Result<()> {
        self.act("write_bytes", json!({ "spec": spec, "offset": offset, "values": bytes }))
    }

    pub fn discard(&self, spec: &Spec, offset: u64, length: u64) -> Result<()> {
        self.act("discard", json!({ "spec": spec, "offset": offset, "length": length }))
    }

    pub fn write_zeroes(&self, spec: &Spec, offset: u64, length: u64) -> Result<()> {
        self.act("write_zeroes", json!({ "spec": spec, "offset": offset, "length": length }))
    }

    /// The whole content at a snapshot, or at the head. For small images.
    pub fn read(&self, spec: &Spec, snapshot: Option<&str>) -> Result<Vec<u8>> {
        let file = NamedTempFile::new().expect("a temporary file");
        self.read_to(spec, snapshot, file.path())?;
        Ok(std::fs::read(file.path()).expect("what the driver read"))
    }

    /// Writes the whole content to a sparse file, whose length is then the image's size.
    pub fn read_to(&self, spec: &Spec, snapshot: Option<&str>, path: &Path) -> Result<()> {
        self.act("read", json!({ "spec": spec, "snapshot": snapshot, "path": path }))
    }

    /// As [`read_to`](Self::read_to), but from the objects themselves, as the OSDs hold them: what clients
    /// see once the object maps are repaired, whatever they say now. An image that is migrating is read
    /// through librbd all the same.
    pub fn read_objects_to(&self, spec: &Spec, snapshot: Option<&str>, path: &Path) -> Result<()> {
        self.act("read_objects", json!({ "spec": spec, "snapshot": snapshot, "path": path }))
    }

    /// As [`read`](Self::read), but from the objects themselves.
    pub fn read_objects(&self, spec: &Spec, snapshot: Option<&str>) -> Result<Vec<u8>> {
        let file = NamedTempFile::new().expect("a temporary file");
        self.read_objects_to(spec, snapshot, file.path())?;
        Ok(std::fs::read(file.path()).expect("what the driver read"))
    }

    /// Whether the image's head has an object of its own, whatever its object map says.
    pub fn object_exists(&self, spec: &Spec, object: u64) -> Result<bool> {
        self.ask("object_exists", json!({ "spec": spec, "object": object }))
    }

    /// Writes noise to one object of the image through librbd, from a byte of its first stripe unit on. What lies
    /// behind the image's end is not written.
    pub fn write_object(&self, spec: &Spec, object: u64, offset: u64, length: u64, seed: u64) -> Result<()> {
        let info = self.info(spec, None)?;
        let offset = offset % info.stripe_unit;
        let (set, place) = (object / info.stripe_count, object % info.stripe_count);
        let at = set * info.object_size * info.stripe_count + place * info.stripe_unit + offset;
        let length = length.min(info.stripe_unit - offset).min(info.size.saturating_sub(at));
        if length == 0 { Ok(()) } else { self.write(spec, at, length, seed) }
    }

    /// Writes noise to one object of the image, as a client does whose snapshot context is an old one:
    /// `seq` is the newest snapshot that it has heard of (0: none), `snaps` are those that it knows (see
    /// [`snap_numbers`](Self::snap_numbers)). No object map learns of it.
    #[allow(clippy::too_many_arguments)]
    pub fn stale_write(
        &self,
        spec: &Spec,
        object: u64,
        offset: u64,
        length: u64,
        seed: u64,
        seq: u64,
        snaps: &[u64],
    ) -> Result<()> {
        let what = json!({ "spec": spec, "object": object, "offset": offset, "length": length,
                           "seed": seed, "seq": seq, "snaps": snaps });
        self.act("stale_write", what)
    }

    /// The SHA-256 of the whole content, in hexadecimal digits.
    pub fn sha256(&self, spec: &Spec, snapshot: Option<&str>) -> Result<String> {
        self.ask("read", json!({ "spec": spec, "snapshot": snapshot, "path": null }))
    }

    /// Offset and length of what was written to since a snapshot, as the OSDs tell.
    pub fn changes(&self, spec: &Spec, snapshot: &str) -> Result<Vec<(u64, u64)>> {
        self.ask("changes", json!({ "spec": spec, "snapshot": snapshot }))
    }

    // --- Snapshots

    /// Takes a snapshot and gives its id.
    pub fn snap_create(&self, spec: &Spec, snapshot: &str) -> Result<u64> {
        self.ask("snap_create", json!({ "spec": spec, "snapshot": snapshot }))
    }

    pub fn snap_remove(&self, spec: &Spec, snapshot: &str) -> Result<()> {
        self.act("snap_remove", json!({ "spec": spec, "snapshot": snapshot }))
    }

    pub fn snap_rename(&self, spec: &Spec, snapshot: &str, name: &str) -> Result<()> {
        self.act("snap_rename", json!({ "spec": spec, "snapshot": snapshot, "name": name }))
    }

    pub fn snap_protect(&self, spec: &Spec, snapshot: &str) -> Result<()> {
        self.act("snap_protect", json!({ "spec": spec, "snapshot": snapshot }))
    }

    pub fn snap_unprotect(&self, spec: &Spec, snapshot: &str) -> Result<()> {
        self.act("snap_unprotect", json!({ "spec": spec, "snapshot": snapshot }))
    }

    /// The image's snapshots, in the order of their ids; not those in the trash or of groups.
    pub fn snaps(&self, spec: &Spec) -> Result<Vec<Snap>> {
        self.look("snaps", json!({ "spec": spec }))
    }

    /// The ids of all snapshots, those in the trash included, newest first: the context in which librbd
    /// writes.
    pub fn snap_numbers(&self, spec: &Spec) -> Result<Vec<u64>> {
        self.look("snap_numbers", json!({ "spec": spec }))
    }

    /// Makes the head what it was at the snapshot, its size included.
    pub fn rollback(&self, spec: &Spec, snapshot: &str) -> Result<()> {
        self.act("rollback", json!({ "spec": spec, "snapshot": snapshot }))
    }
}

impl Process {
    /// Starts a child that says on `stderr` what goes wrong.
    fn start(stderr: &NamedTempFile) -> Self {
        let mut child = Command::new(PYTHON)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.reopen().expect("the temporary file"))
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {PYTHON}: {error}"));
        let stdout = child.stdout.take().expect("a pipe");
        let (send, answers) = channel();
        // Ends with the child's stdout.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Self { stdin: child.stdin.take(), child, answers }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "kill {signal}");
    }

    /// Ends the child and tells how it ended.
    fn kill(&mut self) -> String {
        self.stdin = None;
        let _ = self.child.kill();
        self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for Process {
    /// Lets the child close its images, so that no lock of a dead client is left for others to wait for.
    fn drop(&mut self) {
        // It may be frozen, where a test has failed.
        let _ =
            Command::new("kill").args(["-CONT", &self.child.id().to_string()]).stderr(Stdio::null()).status();
        self.stdin = None;
        // The child itself leaves 5 s after its input ended, whatever hangs.
        let give_up = Instant::now() + Duration::from_secs(10);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }
}
