//! The life of a chain on a real file system, with layers that `qemu-img` makes.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::durable::fault::{self, Fault};
use super::manifest::tests::record;
use super::*;

mod lost;
mod power;

pub(crate) const CLUSTER_SIZE: u32 = 65536;

/// Not a multiple of a sector: the layer is 511 bytes larger.
pub(crate) const VIRTUAL_SIZE: u64 = (1 << 20) + 1;

/// Whether `qemu-img` can be run. Where the environment requires the tools, it must.
pub(crate) fn qemu_img_is_there() -> bool {
    let there =
        Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    let required = std::env::var("RBD2QCOW2_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    assert!(there || !required, "qemu-img is required and cannot be run");
    if !there {
        // To the terminal itself, since the test harness keeps the output of tests that pass.
        use std::io::Write;
        _ = writeln!(io::stderr(), "SKIPPED: qemu-img cannot be run");
    }
    there
}

/// Makes a qcow2 file with `qemu-img create`.
pub(crate) fn create_layer(path: &Path, virtual_size: u64, backing: Option<&str>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-u"]);
    if let Some(backing) = backing {
        command.args(["-b", backing, "-F", "qcow2"]);
    }
    let output = command.arg(path).arg(virtual_size.to_string()).output().expect("qemu-img runs");
    assert!(output.status.success(), "{output:?}");
}

pub(crate) fn image() -> ImageName {
    ImageName::new("vm/1").expect("a name")
}

pub(crate) fn point(text: &str) -> PointName {
    PointName::parse(text).expect("a point")
}

/// Makes a whole point upon the newest one, as a backup does.
pub(super) fn back_up(writer: &mut ChainWriter, name: PointName) -> Result<Committed, ChainError> {
    let parent = writer.catalogue().newest();
    let pending = writer.begin(LayerPlan { point: name, parent, cluster_size: CLUSTER_SIZE })?;
    let size = VIRTUAL_SIZE.next_multiple_of(512);
    create_layer(pending.layer_path(), size, pending.backing_name().as_deref());
    let segment = pending.digests().segment(0);
    segment.add(0, &[1; 4096]);
    segment.add_zero(4096..65536);
    drop(segment);
    let committed = pending.commit(record(VIRTUAL_SIZE, name))?;
    writer.refresh()?;
    Ok(committed)
}

const FIRST: &str = "20261122T173312Z";
const SECOND: &str = "20261123T173307Z";

/// Every file of the directory with its content, except the lock, whose content is nobody's.
fn content(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry"));
    let files = entries.map(|entry| (entry.file_name().into_string().expect("text"), entry.path()));
    files
        .filter(|(name, _)| name != lock::LOCK_FILE)
        .map(|(name, path)| (name, fs::read(path).expect("readable")))
        .collect()
}

fn names(directory: &Path) -> Vec<String> {
    content(directory).into_keys().collect()
}

fn files_of(points: &[&str]) -> Vec<String> {
    let suffixes = [".digests", ".json", ".qcow2"];
    points.iter().flat_map(|point| suffixes.map(|suffix| format!("vm%2F1@{point}{suffix}"))).collect()
}

fn check_qemu_accepts(path: &Path) {
    let output = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path).output();
    let output = output.expect("qemu-img runs");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn points_are_made_and_read_back() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    let first = back_up(&mut writer, point(FIRST)).expect("committed");
    let second = back_up(&mut writer, point(SECOND)).expect("committed");
    let directory = dest.path().join("vm%2F1");
    assert_eq!(names(&directory), files_of(&[FIRST, SECOND]));
    for name in names(&directory) {
        let mode = fs::metadata(directory.join(name)).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o400);
    }
    check_qemu_accepts(&second.path);

    let catalogue = Catalogue::read(&directory, &image()).expect("read");
    assert!(catalogue.problems().is_empty(), "{:?}", catalogue.problems());
    assert!(catalogue.points().iter().all(|point| point.sound));
    let newest = catalogue.newest().expect("two points");
    assert_eq!((newest.name, newest.kind), (point(SECOND), Some(PointKind::Incremental)));
    assert_eq!(newest.manifest.as_ref(), Some(&second.manifest));
    assert_eq!(newest.virtual_size(), Some(VIRTUAL_SIZE));
    assert_eq!(newest.layer_bytes, second.layer_bytes);
    let ancestry = catalogue.ancestry(newest.name).expect("whole");
    assert_eq!(ancestry.iter().map(|point| &point.path).collect::<Vec<_>>(), [&second.path, &first.path]);
    let digests = digests::DigestReader::open(&second.path.with_extension("digests")).expect("opened");
    assert_eq!(digests.map(|record| record.expect("valid").length).collect::<Vec<_>>(), [4096, 61440]);
    second.manifest.digests.check_file(&second.path.with_extension("digests")).expect("unchanged");
}

#[test]
fn a_commit_keeps_its_order() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    fault::plan(None);
    back_up(&mut writer, point(FIRST)).expect("committed");
    let expected = [
        "create .vm%2F1@20261122T173312Z.digests.partial",
        "seal .vm%2F1@20261122T173312Z.digests.partial",
        "seal .vm%2F1@20261122T173312Z.qcow2.partial",
        "create .vm%2F1@20261122T173312Z.json.partial",
        "seal .vm%2F1@20261122T173312Z.json.partial",
        "sync directory vm%2F1",
        "rename vm%2F1@20261122T173312Z.digests",
        "rename vm%2F1@20261122T173312Z.json",
        "sync directory vm%2F1",
        "rename vm%2F1@20261122T173312Z.qcow2",
        "sync directory vm%2F1",
    ];
    assert_eq!(fault::steps(), expected);
}

/// Opens the chain, announces the chain and makes its second point: one run of a backup program.
fn run(dest: &Path) -> Result<(), ChainError> {
    let mut writer = ChainWriter::open(dest, &image())?;
    let name = point(SECOND);
    let chain = record(VIRTUAL_SIZE, name).chain;
    let text = |text: &str| text.to_owned();
    let snapshot = SnapshotName { chain, point: name };
    let announcement = Announcement { snapshot, fsid: text("f"), pool: text("rbd"), namespace: text("") };
    writer.announce(&announcement)?;
    back_up(&mut writer, name)?;
    writer.clear_announcement()
}

/// A destination that holds one point, and the litter of a killed run.
fn destination() -> tempfile::TempDir {
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    back_up(&mut writer, point(FIRST)).expect("committed");
    fs::write(writer.directory().join(".vm%2F1@20261122T180000Z.qcow2.partial"), b"half").expect("written");
    dest
}

/// Checks what must hold after a run stopped anywhere, and that the next run gets on with it.
fn check_recovery(dest: &Path, at: usize, before: &BTreeMap<String, Vec<u8>>) {
    let directory = image_directory(dest, &image());
    let catalogue = Catalogue::read(&directory, &image()).expect("read");
    assert!(catalogue.problems().is_empty(), "step {at}: {:?}", catalogue.problems());
    assert!(catalogue.points().iter().all(|point| point.sound), "step {at}");
    let points: Vec<_> = catalogue.points().iter().map(|point| point.name.to_string()).collect();
    let committed = points == [FIRST, SECOND];
    assert!(committed || points == [FIRST], "step {at}: {points:?}");

    let mut writer = ChainWriter::open(dest, &image()).expect("the next run opens the chain");
    let (name, expected) = if committed {
        assert_eq!(names(&directory), files_of(&[FIRST, SECOND]), "step {at}");
        ("20261124T173307Z", files_of(&[FIRST, SECOND, "20261124T173307Z"]))
    } else {
        let left = content(&directory);
        let rest = left.iter().filter(|(name, _)| *name != ANNOUNCEMENT_FILE);
        assert!(rest.eq(before), "step {at}: {:?}", names(&directory));
        (SECOND, files_of(&[FIRST, SECOND]))
    };
    back_up(&mut writer, point(name)).expect("the next run makes its point");
    writer.clear_announcement().expect("cleared");
    assert_eq!(names(&directory), expected, "step {at}");
}

/// The content of a destination that [`run`] must not touch.
fn untouchable(dest: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut before = content(&image_directory(dest, &image()));
    before.retain(|name, _| !name.starts_with('.'));
    before
}

fn number_of_steps() -> usize {
    let dest = destination();
    fault::plan(None);
    run(dest.path()).expect("nothing is in the way");
    fault::steps().len()
}

/// The chain id of the sample is in the first point's manifest, so the note of a run that came to
/// nothing is not kept: it could not tell anything new.
#[test]
fn a_crash_before_any_step_harms_no_point() {
    if !qemu_img_is_there() {
        return;
    }
    for at in 0..number_of_steps() {
        let dest = destination();
        let before = untouchable(dest.path());
        fault::plan(Some((at, Fault::Crash)));
        run(dest.path()).expect_err("the crash is noticed");
        fault::plan(None);
        check_recovery(dest.path(), at, &before);
    }
}

#[test]
fn a_failure_of_any_step_is_reported_and_cleaned_up() {
    if !qemu_img_is_there() {
        return;
    }
    for at in 0..number_of_steps() {
        let dest = destination();
        let before = untouchable(dest.path());
        fault::plan(Some((at, Fault::Fail)));
        let error = run(dest.path()).expect_err("the failure is reported");
        let steps = fault::steps();
        let exists = dest.path().join(format!("vm%2F1/vm%2F1@{SECOND}.qcow2")).exists();
        let renamed = steps.iter().position(|step| *step == format!("rename vm%2F1@{SECOND}.qcow2"));
        assert_eq!(exists, renamed.is_some_and(|renamed| at > renamed), "step {at}: {steps:?}");
        if exists && at == renamed.unwrap_or_default() + 1 {
            assert!(matches!(error, ChainError::CommitUncertain { .. }), "step {at}: {error}");
        }
        check_recovery(dest.path(), at, &before);
    }
}

const KILLED_DEST: &str = "RBD2QCOW2_TEST_KILLED_DEST";
const KILLED_AT: &str = "RBD2QCOW2_TEST_KILLED_AT";

/// Not a test of its own: the process that [`a_kill_before_any_step_harms_no_point`] has killed.
#[test]
fn killed_run() {
    let (Ok(dest), Ok(at)) = (std::env::var(KILLED_DEST), std::env::var(KILLED_AT)) else {
        return;
    };
    fault::plan(Some((at.parse().expect("a number"), Fault::Kill)));
    run(Path::new(&dest)).expect("only the kill is in the way");
}

#[test]
fn a_kill_before_any_step_harms_no_point() {
    use std::os::unix::process::ExitStatusExt;
    if !qemu_img_is_there() {
        return;
    }
    for at in 0..number_of_steps() {
        let dest = destination();
        let before = untouchable(dest.path());
        let mut child = Command::new(std::env::current_exe().expect("a path"));
        child.args(["--exact", "chain::tests::killed_run", "--test-threads=1"]);
        let output =
            child.env(KILLED_DEST, dest.path()).env(KILLED_AT, at.to_string()).output().expect("it runs");
        assert_eq!(output.status.signal(), Some(9), "step {at}: {output:?}");
        check_recovery(dest.path(), at, &before);
    }
}

#[test]
fn dropping_a_pending_layer_removes_it() {
    let dest = tempfile::tempdir().expect("a directory");
    let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    let plan = LayerPlan { point: point(FIRST), parent: None, cluster_size: CLUSTER_SIZE };
    let pending = writer.begin(plan).expect("begun");
    fs::write(pending.layer_path(), b"half a layer").expect("written");
    assert_eq!(names(writer.directory()).len(), 2);
    drop(pending);
    assert_eq!(names(writer.directory()), [""; 0]);
}

#[test]
fn a_layer_that_is_not_as_planned_is_discarded() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    back_up(&mut writer, point(FIRST)).expect("committed");
    let before = content(writer.directory());
    let backing = format!("vm%2F1@{FIRST}.qcow2");
    let size = VIRTUAL_SIZE.next_multiple_of(512);
    let layers: [(&str, u64, Option<&str>); 4] = [
        ("backing file", size, None),
        ("backing file", size, Some("vm%2F1@20261122T173311Z.qcow2")),
        ("virtual size", size - 512, Some(&backing)),
        ("cluster size", size, Some(&backing)),
    ];
    for (index, (expected, size, backing)) in layers.into_iter().enumerate() {
        let cluster_size = if index == 3 { 2 * CLUSTER_SIZE } else { CLUSTER_SIZE };
        let parent = writer.catalogue().newest();
        let plan = LayerPlan { point: point(SECOND), parent, cluster_size };
        let pending = writer.begin(plan).expect("begun");
        create_layer(pending.layer_path(), size, backing);
        match pending.commit(record(VIRTUAL_SIZE, point(SECOND))) {
            Err(ChainError::LayerNotAsPlanned { what, .. }) => assert_eq!(what, expected),
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(content(writer.directory()), before);
    }
    let plan =
        LayerPlan { point: point(SECOND), parent: writer.catalogue().newest(), cluster_size: CLUSTER_SIZE };
    let error = writer.begin(plan).expect("begun").commit(record(VIRTUAL_SIZE, point(SECOND)));
    assert!(matches!(error, Err(ChainError::Io { .. })), "no layer at all: {error:?}");
    assert_eq!(content(writer.directory()), before);
}

#[test]
fn a_point_must_be_newer_than_all_others() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    back_up(&mut writer, point(SECOND)).expect("committed");
    for name in [FIRST, SECOND] {
        let plan = LayerPlan { point: point(name), parent: None, cluster_size: CLUSTER_SIZE };
        assert!(matches!(writer.begin(plan), Err(ChainError::NotNewest { .. })));
    }
    let (next, back) = writer.next_point(point(FIRST).timestamp()).expect("a point");
    assert_eq!((next.to_string().as_str(), back), ("20261123T173308Z", true));
}

#[test]
fn a_damaged_parent_is_not_built_upon() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    let first = back_up(&mut writer, point(FIRST)).expect("committed");
    back_up(&mut writer, point(SECOND)).expect("committed");
    fs::remove_file(first.path).expect("removed");
    writer.refresh().expect("read");
    let plan = LayerPlan {
        point: point("20261124T173307Z"),
        parent: writer.catalogue().newest(),
        cluster_size: CLUSTER_SIZE,
    };
    let error = writer.begin(plan).expect_err("the root is gone");
    let ChainError::ParentUnsound { cause, .. } = error else { panic!("{error:?}") };
    assert!(matches!(*cause, Problem::ParentMissing { .. }), "{cause}");
    // What is known of the lost point is kept, for whoever mends the chain.
    drop(writer);
    let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert!(writer.removed().is_empty());
}

#[test]
fn only_what_killed_runs_left_is_removed() {
    let dest = tempfile::tempdir().expect("a directory");
    let directory = dest.path().join("vm%2F1");
    fs::create_dir(&directory).expect("created");
    let foreign = [
        "notes.txt",
        "qcow2_x8ad93",
        ".hidden",
        "empty.qcow2",
        "vm%2F2@20261122T173312Z.json",
        ".vm%2F2@20261122T173312Z.qcow2.partial",
        "vm%2F1@20261122T173312Z.qcow2.partial",
        ".vm%2F1@20261122T173312Z.qcow2",
        // What is left of a lost point.
        "vm%2F1@20261122T173313Z.json",
        "vm%2F1@20261122T173313Z.digests",
    ];
    let leftovers = [
        ".vm%2F1@20261122T173312Z.qcow2.partial",
        ".vm%2F1@20261122T173312Z.json.partial",
        ".vm%2F1@20261122T173312Z.digests.partial",
        ".pending.json.partial",
        "vm%2F1@20261122T173314Z.digests",
    ];
    for name in foreign.iter().chain(&leftovers) {
        fs::write(directory.join(name), b"x").expect("written");
    }
    fs::create_dir(directory.join(".vm%2F1@20261122T173316Z.qcow2.partial")).expect("created");
    // A layer on another disk is not this program's doing, but is no left-over either.
    std::os::unix::fs::symlink("/nowhere", directory.join("vm%2F1@20261122T173315Z.qcow2")).expect("a link");
    fs::write(directory.join("vm%2F1@20261122T173315Z.json"), b"x").expect("written");
    let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    let mut removed: Vec<_> = writer.removed().iter().filter_map(|path| path.file_name()?.to_str()).collect();
    let mut expected = leftovers;
    removed.sort_unstable();
    expected.sort_unstable();
    assert_eq!(removed, expected);
    for name in foreign {
        assert!(directory.join(name).exists(), "{name} is gone");
    }
    assert!(directory.join("vm%2F1@20261122T173315Z.json").exists());
    assert!(directory.join(".vm%2F1@20261122T173316Z.qcow2.partial").exists());
}

#[test]
fn destinations_are_checked() {
    let dest = tempfile::tempdir().expect("a directory");
    let open = |path: &Path| ChainWriter::open(path, &image()).map(drop);
    let missing = dest.path().join("missing");
    assert!(matches!(open(&missing), Err(ChainError::DestinationMissing { .. })));
    assert!(!missing.exists());
    let file = dest.path().join("file");
    fs::write(&file, b"").expect("written");
    assert!(matches!(open(&file), Err(ChainError::NotADirectory { .. })));
    std::os::unix::fs::symlink("/tmp", dest.path().join("vm%2F1")).expect("a link");
    assert!(matches!(open(dest.path()), Err(ChainError::NotADirectory { .. })));
    // Read-only for everyone, root included.
    let refused = open(Path::new("/proc/self"));
    assert!(
        matches!(refused, Err(ChainError::DestinationNotWritable { .. } | ChainError::Io { .. })),
        "{refused:?}"
    );
}

#[test]
fn two_writers_exclude_each_other() {
    let dest = tempfile::tempdir().expect("a directory");
    let _writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    let error = ChainWriter::open(dest.path(), &image()).expect_err("locked");
    assert!(matches!(error, ChainError::Locked { .. }), "{error}");
    let other = ImageName::new("vm/2").expect("a name");
    _ = ChainWriter::open(dest.path(), &other).expect("another image is another chain");
}

#[test]
fn an_announcement_survives_until_its_chain_has_a_point() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert_eq!(writer.announced().expect("no note"), None);
    let chain = record(0, point(FIRST)).chain;
    let announcement = Announcement {
        snapshot: SnapshotName { chain, point: point(FIRST) },
        fsid: "f".to_owned(),
        pool: "rbd".to_owned(),
        namespace: "ns".to_owned(),
    };
    writer.announce(&announcement).expect("noted");
    drop(writer);
    writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert_eq!(writer.announced().expect("a note"), Some(announcement.clone()));
    writer.clear_announcement().expect("cleared");
    writer.clear_announcement().expect("nothing to clear");
    assert_eq!(writer.announced().expect("no note"), None);
    // Killed between the commit and the removal of the note: the snapshot is that of a point now.
    writer.announce(&announcement).expect("noted");
    back_up(&mut writer, point(FIRST)).expect("committed");
    drop(writer);
    writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert_eq!(writer.announced().expect("no note"), None);
    // Even if that point's manifest is damaged by now.
    writer.announce(&announcement).expect("noted");
    fs::remove_file(writer.directory().join(format!("vm%2F1@{FIRST}.json"))).expect("removed");
    drop(writer);
    writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert_eq!(writer.announced().expect("no note"), None);
    fs::write(writer.directory().join(ANNOUNCEMENT_FILE), b"{").expect("written");
    assert!(matches!(writer.announced(), Err(ChainError::AnnouncementDamaged { .. })));
}
