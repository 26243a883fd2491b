use std::fs::{self, File};
use std::process::Command;

use super::*;
use crate::chain::tests::{back_up, create_layer, image, point, qemu_img_is_there};
use crate::chain::{ChainWriter, SnapshotName};

const POINTS: [&str; 3] = ["20261122T173312Z", "20261123T173307Z", "20261124T173307Z"];

/// A chain of three points.
struct Fixture {
    dest: tempfile::TempDir,
}

impl Fixture {
    /// `None` where the tools are missing.
    fn new() -> Option<Self> {
        if !qemu_img_is_there() {
            return None;
        }
        let dest = tempfile::tempdir().expect("a directory");
        let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
        for name in POINTS {
            back_up(&mut writer, point(name)).expect("committed");
        }
        Some(Self { dest })
    }

    fn directory(&self) -> PathBuf {
        self.dest.path().join("vm%2F1")
    }

    fn path(&self, index: usize, kind: FileKind) -> PathBuf {
        let file = PointFile { image: image(), point: point(POINTS[index]), kind };
        self.directory().join(file.file_name())
    }

    fn read(&self) -> Catalogue {
        Catalogue::read(&self.directory(), &image()).expect("the directory can be listed")
    }

    /// Checks that there is one problem, and which points it harms.
    fn check(&self, sound: [bool; 3], expected: impl FnOnce(&Problem) -> bool) -> Catalogue {
        let catalogue = self.read();
        let [problem] = catalogue.problems() else { panic!("{:?}", catalogue.problems()) };
        assert!(expected(problem), "{problem:?}");
        assert!(problem.to_string().contains(problem.path().to_str().expect("text")), "{problem}");
        let found: Vec<_> = catalogue.points().iter().map(|point| point.sound).collect();
        assert_eq!(found, sound, "{problem:?}");
        for point in catalogue.points() {
            assert_eq!(catalogue.ancestry(point.name).is_ok(), point.sound, "{}", point.name);
        }
        catalogue
    }
}

/// Replaces the bytes at `offset` of a file, which is read-only for everyone but root.
fn patch(path: &Path, offset: usize, bytes: &[u8]) {
    let mut content = fs::read(path).expect("readable");
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
    fs::remove_file(path).expect("removed");
    fs::write(path, content).expect("written");
}

#[test]
fn a_whole_chain_has_no_problems() {
    let Some(fixture) = Fixture::new() else { return };
    let catalogue = fixture.read();
    assert!(catalogue.problems().is_empty() && catalogue.leftovers().is_empty());
    let kinds: Vec<_> = catalogue.points().iter().map(|point| point.kind).collect();
    assert_eq!(kinds, [Some(PointKind::Full), Some(PointKind::Incremental), Some(PointKind::Incremental)]);
    assert_eq!(catalogue.chain_ids().len(), 1);
    assert_eq!(catalogue.last_name(), Some(point(POINTS[2])));
    let newest = catalogue.newest().expect("a point");
    assert_eq!(newest.snapshot().expect("recorded"), format!("rbd2qcow2-00c0ffee-{}", POINTS[2]));
    let missing = catalogue.ancestry(point("1")).expect_err("no such point");
    assert!(matches!(missing, Problem::NoSuchPoint { .. }), "{missing}");
}

#[test]
fn an_unreadable_header_harms_what_builds_upon_it() {
    let Some(fixture) = Fixture::new() else { return };
    patch(&fixture.path(1, FileKind::Layer), 0, b"JUNK");
    let catalogue = fixture.check([true, false, false], |problem| matches!(problem, Problem::Header { .. }));
    // The manifest still tells where it belongs.
    assert_eq!(catalogue.points()[1].kind, Some(PointKind::Incremental));
    assert_eq!(catalogue.points()[1].parent, Some(point(POINTS[0])));
}

#[test]
fn a_layer_marked_corrupt_is_not_sound() {
    let Some(fixture) = Fixture::new() else { return };
    patch(&fixture.path(2, FileKind::Layer), 79, &[2]);
    fixture.check([true, true, false], |problem| matches!(problem, Problem::Header { .. }));
}

#[test]
fn a_missing_parent_is_named() {
    let Some(fixture) = Fixture::new() else { return };
    fs::remove_file(fixture.path(1, FileKind::Layer)).expect("removed");
    let catalogue = fixture.read();
    let [Problem::ParentMissing { parent, .. }, lost @ Problem::LayerMissing { .. }] = catalogue.problems()
    else {
        panic!("{:?}", catalogue.problems())
    };
    assert_eq!(*parent, point(POINTS[1]));
    let text = lost.to_string();
    let missing = fixture.path(1, FileKind::Layer);
    let expected = format!(
        "point {} is lost: its layer {} is missing; point {} needs it; bring that file back, ",
        POINTS[1],
        missing.display(),
        POINTS[2]
    );
    assert!(text.starts_with(&expected), "{text}");
    assert!(catalogue.newest_lost().is_none() && catalogue.is_missed(point(POINTS[1])));
    assert_eq!(catalogue.points().iter().map(|point| point.sound).collect::<Vec<_>>(), [true, false]);
    assert!(catalogue.leftovers().is_empty(), "the lost point's manifest is needed to mend the chain");
}

#[test]
fn a_lost_newest_point_is_no_left_over() {
    let Some(fixture) = Fixture::new() else { return };
    fs::remove_file(fixture.path(2, FileKind::Layer)).expect("removed");
    let catalogue = fixture.read();
    assert!(matches!(catalogue.problems(), [Problem::LayerMissing { .. }]), "{:?}", catalogue.problems());
    assert!(catalogue.leftovers().is_empty());
    assert_eq!(catalogue.newest_lost().expect("the newest").name, point(POINTS[2]));
    let lost = catalogue.ancestry(point(POINTS[2])).expect_err("it is lost");
    assert!(matches!(lost, Problem::LayerMissing { .. }), "{lost}");
    // Whatever is left of its manifest: somebody may mend it.
    patch(&fixture.path(2, FileKind::Manifest), 10, b"!");
    let catalogue = fixture.read();
    assert!(catalogue.leftovers().is_empty() && catalogue.lost()[0].manifest.is_none());
    assert_eq!(catalogue.chain_ids().len(), 1);
    // Digests alone tell of nothing.
    fs::remove_file(fixture.path(2, FileKind::Manifest)).expect("removed");
    let catalogue = fixture.read();
    assert_eq!(catalogue.leftovers(), [fixture.path(2, FileKind::Digests)]);
    assert!(catalogue.problems().is_empty() && catalogue.lost().is_empty());
    // Its name is not given to another point while they are there.
    assert_eq!(catalogue.last_name(), Some(point(POINTS[2])));
}

#[test]
fn a_layer_that_was_cut_off_or_written_to_is_found() {
    let Some(fixture) = Fixture::new() else { return };
    let path = fixture.path(2, FileKind::Layer);
    let length = fs::metadata(&path).expect("there").len();
    let file = File::options().write(true).open(&path).expect("opened");
    // The L1 table ends 8 bytes before the file does, as in every new file of this QEMU.
    file.set_len(length + 1).expect("extended");
    fixture.check([true, true, false], |problem| {
        matches!(problem, Problem::Disagreement { what: "file length", .. })
    });
    file.set_len(length - 1).expect("cut off");
    let catalogue = fixture.read();
    let problems = catalogue.problems();
    assert!(problems.iter().any(|problem| matches!(problem, Problem::Header { .. })), "{problems:?}");
    assert!(problems.iter().any(|problem| matches!(problem, Problem::Truncated { .. })), "{problems:?}");
    assert!(!catalogue.points()[2].sound);
}

#[test]
fn a_bad_manifest_or_digests_leave_the_layer_readable() {
    let Some(fixture) = Fixture::new() else { return };
    let (manifest, digests) = (fixture.path(1, FileKind::Manifest), fixture.path(1, FileKind::Digests));
    let content = fs::read(&digests).expect("readable");
    fs::remove_file(&digests).expect("removed");
    fixture.check([true; 3], |problem| matches!(problem, Problem::DigestsMissing { .. }));
    fs::write(&digests, &content[1..]).expect("written");
    fixture.check([true; 3], |problem| matches!(problem, Problem::DigestsLength { .. }));
    fs::write(&digests, content).expect("written");
    patch(&manifest, 10, b"!");
    let damaged = |problem: &Problem| matches!(problem, Problem::Manifest { .. });
    let catalogue = fixture.check([true; 3], damaged);
    assert!(catalogue.points()[1].manifest.is_none());
    assert_eq!(catalogue.points()[1].snapshot(), None);
    fs::remove_file(&manifest).expect("removed");
    fixture.check([true; 3], damaged);
}

#[test]
fn manifest_and_header_must_agree() {
    let Some(fixture) = Fixture::new() else { return };
    let path = fixture.path(2, FileKind::Layer);
    let content = fs::read(&path).expect("readable");
    // Of the same length, upon another parent.
    let backing = format!("vm%2F1@{}.qcow2", POINTS[0]);
    fs::remove_file(&path).expect("removed");
    create_layer(&path, (1 << 20) + 512, Some(&backing));
    fixture.check([true, true, false], |problem| {
        matches!(problem, Problem::Disagreement { what: "parent", .. })
    });
    fs::write(&path, content).expect("written");
    patch(&path, 24, &((1u64 << 20) + 1024).to_be_bytes());
    fixture.check([true, true, false], |problem| {
        matches!(problem, Problem::Disagreement { what: "virtual size", .. })
    });
}

#[test]
fn a_backing_file_is_an_older_point_of_the_image() {
    let Some(fixture) = Fixture::new() else { return };
    let outside = fixture.dest.path().join("outside.qcow2");
    create_layer(&outside, 1 << 20, None);
    for backing in [
        outside.to_str().expect("text"),
        "../outside.qcow2",
        "nbd:localhost:10809",
        "json:{\"driver\":\"null-co\"}",
        "empty.qcow2",
        "vm%2F1@20261124T173307Z.qcow2",
        "vm%2F1@20261125T173307Z.qcow2",
        "vm%2F2@20261122T173312Z.qcow2",
        "vm%2f1@20261122T173312Z.qcow2",
        "vm%2F1@20261122T173312Z.json",
    ] {
        let path = fixture.path(2, FileKind::Layer);
        _ = fs::remove_file(&path);
        create_layer(&path, (1 << 20) + 512, Some(backing));
        let catalogue = fixture.read();
        assert!(!catalogue.points()[2].sound, "{backing}");
        assert!(catalogue.ancestry(point(POINTS[2])).is_err(), "{backing}");
        assert!(!catalogue.problems().is_empty(), "{backing}");
    }
}

#[test]
fn what_is_no_file_is_told_and_not_followed() {
    let Some(fixture) = Fixture::new() else { return };
    let path = fixture.path(0, FileKind::Layer);
    let elsewhere = fixture.dest.path().join("elsewhere");
    fs::rename(&path, &elsewhere).expect("renamed");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("a link");
    let catalogue = fixture.read();
    assert!(matches!(catalogue.problems()[0], Problem::Symlink { .. }), "{:?}", catalogue.problems());
    assert_eq!(catalogue.points().len(), 2);
    assert!(catalogue.points().iter().all(|point| !point.sound));
    assert!(catalogue.leftovers().is_empty());
    fs::remove_file(&path).expect("removed");
    // Opening a pipe would block.
    let made = Command::new("mkfifo").arg(&path).status().expect("mkfifo runs");
    assert!(made.success());
    assert!(matches!(fixture.read().problems()[0], Problem::NotARegularFile { .. }));
}

#[test]
fn a_note_of_a_run_that_did_not_end_is_told() {
    let Some(fixture) = Fixture::new() else { return };
    assert!(fixture.read().announced().expect("readable").is_none());
    let writer = ChainWriter::open(fixture.dest.path(), &image()).expect("opened");
    let announcement = Announcement {
        snapshot: SnapshotName { chain: ChainId::draw().expect("drawn"), point: point("20261125T173307Z") },
        fsid: String::new(),
        pool: "rbd".into(),
        namespace: String::new(),
    };
    writer.announce(&announcement).expect("noted");
    assert_eq!(fixture.read().announced().expect("readable"), Some(announcement));
    fs::write(fixture.directory().join(".pending.json"), b"{}").expect("written");
    let damaged = fixture.read().announced();
    assert!(matches!(damaged, Err(ChainError::AnnouncementDamaged { .. })), "{damaged:?}");
}

#[test]
fn foreign_files_are_noted() {
    let Some(fixture) = Fixture::new() else { return };
    let foreign = fixture.directory().join("qcow2_x8ad93");
    fs::write(&foreign, b"").expect("written");
    let catalogue = fixture.check([true; 3], |problem| matches!(problem, Problem::Foreign { .. }));
    assert_eq!(catalogue.problems()[0].path(), foreign);
}

/// The files that `python3 -m rbd2qcow2` makes, by its source.
fn python_chain(directory: &Path) {
    create_layer(&directory.join("empty.qcow2"), 1 << 20, None);
    create_layer(&directory.join("vm%2F1@1795368792.qcow2"), 4 << 20, Some("empty.qcow2"));
    create_layer(&directory.join("vm%2F1@1795368999.qcow2"), 8 << 20, Some("vm%2F1@1795368792.qcow2"));
}

#[test]
fn a_chain_of_the_python_tool_is_understood_and_continued() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let directory = dest.path().join("vm%2F1");
    fs::create_dir(&directory).expect("created");
    python_chain(&directory);
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert!(writer.catalogue().problems().is_empty(), "{:?}", writer.catalogue().problems());
    let newest = writer.catalogue().newest().expect("two points");
    assert_eq!((newest.kind, newest.virtual_size()), (Some(PointKind::Incremental), Some(8 << 20)));
    assert_eq!(newest.snapshot().as_deref(), Some("1795368999"));
    assert_eq!(writer.catalogue().points()[0].kind, Some(PointKind::Full));
    assert!(writer.catalogue().chain_ids().is_empty());
    let (name, _) = writer.next_point(newest.name.timestamp()).expect("a point");
    let committed = back_up(&mut writer, name).expect("committed");
    assert_eq!(committed.manifest.parent, Some(point("1795368999")));
    assert_eq!(writer.catalogue().ancestry(name).expect("whole").len(), 3);
    let output = Command::new("qemu-img").args(["info", "--backing-chain"]).arg(&committed.path).output();
    assert!(output.expect("qemu-img runs").status.success());

    fs::remove_file(directory.join("empty.qcow2")).expect("removed");
    let catalogue = Catalogue::read(&directory, &image()).expect("read");
    assert!(matches!(catalogue.problems(), [Problem::Header { .. }]), "{:?}", catalogue.problems());
    assert!(catalogue.points().iter().all(|point| !point.sound));
}

#[test]
fn images_are_told_from_other_directories() {
    let dest = tempfile::tempdir().expect("a directory");
    let make = |name: &str, file: &str| {
        fs::create_dir(dest.path().join(name)).expect("created");
        fs::write(dest.path().join(name).join(file), b"").expect("written");
    };
    make("a%2Fb", ".lock");
    make("python", "python@1795368792.qcow2");
    make("lost+found", ".lock");
    make("%61", ".lock");
    make(".hidden", ".lock");
    make("other", "python@1795368792.qcow2");
    fs::write(dest.path().join("file"), b"").expect("written");
    std::os::unix::fs::symlink("python", dest.path().join("link")).expect("a link");
    let found = images_in(dest.path()).expect("listed");
    let images: Vec<_> = found.images.iter().map(ImageName::as_str).collect();
    assert_eq!(images, ["a/b", "python"]);
    let foreign: Vec<_> = found.foreign.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(foreign, ["%61", ".hidden", "file", "link", "lost+found", "other"]);
    // The directory of an image is told from a destination without images.
    let canonical = dest.path().canonicalize().expect("there");
    for path in [dest.path().join("python"), dest.path().join("a%2Fb/../python/.")] {
        match images_in(&path) {
            Err(ChainError::ImageDirectory { dest, image, .. }) => {
                assert_eq!((dest, image.as_str()), (canonical.clone(), "python"));
            }
            other => panic!("{other:?}"),
        }
    }
    for name in ["other", "a%2Fb"] {
        assert_eq!(images_in(&dest.path().join(name)).expect("listed").foreign.len(), 1, "{name}");
    }
    let missing = images_in(&dest.path().join("missing"));
    assert!(matches!(missing, Err(ChainError::DestinationMissing { .. })));
    let missing = Catalogue::read(&dest.path().join("missing"), &image());
    assert!(matches!(missing, Err(ChainError::NoSuchImage { .. })));
}
