//! Disks that are full, wherever the space ends.

use std::error::Error;
use std::path::Path;
use std::process::Command;

use super::reuse::half_done;
use super::*;
use crate::layer::Compression;
use crate::layer::native::testing::Form;
use crate::layer::qemu_nbd::testing::skip;

/// More than any of these chains needs, in bytes.
const PLENTY: u64 = 64 << 20;

const PAGE: u64 = 4096;

/// A file system in memory at a directory, unmounted on drop.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(place: &'a Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={PLENTY}"), "none"]).arg(place);
        if mount.output().is_ok_and(|output| output.status.success()) {
            return Some(Self(place));
        }
        skip("cannot mount a tmpfs: not root?");
        None
    }

    fn resize(&self, bytes: u64) {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={bytes}")]).arg(self.0);
        assert!(mount.status().expect("there was one").success(), "{bytes} bytes");
    }

    /// Leaves so many bytes free.
    fn leave(&self, bytes: u64) {
        let found = rustix::fs::statvfs(self.0).expect("mounted");
        self.resize((found.f_blocks - found.f_bfree) * found.f_frsize + bytes);
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        // Lazily: nothing may keep the directory from being removed.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

fn copy_all(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("listed") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// What is to be done on a disk that is full.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Points go.
    Forget(Reuse),
    /// One has gone already, and the point above takes over its layer, in place.
    TakeOver,
    /// The same, but somebody has it open, so that it is copied.
    Copy,
}

impl Act {
    fn run(self, fixture: &mut Fixture, gone: &BTreeSet<PointName>) -> Result<(), MergeError> {
        match self {
            Self::Forget(reuse) => fixture.forget(gone, reuse),
            Self::TakeOver => fixture.complete(),
            Self::Copy => {
                let base = fixture.catalogue().bases().first().map(|base| base.path.clone());
                let _reader = base.map(|path| fs::File::open(path).expect("opened"));
                fixture.complete()
            }
        }
    }
}

/// Merges have to do with no space, or with ever more: all points stay as they are, and when there is space
/// again the rest is done.
fn wherever_the_space_ends(form: &Form, act: Act, step: usize) {
    let mut fixture = Fixture::empty("vm");
    let place = fixture.dest.path().to_owned();
    let Some(disk) = SmallDisk::mount(&place) else { return };
    fixture = fixture.with_small_changes(4, form);
    let names = fixture.names();
    let (mut gone, mut stay) = (BTreeSet::from([names[0], names[2]]), vec![names[1], names[3]]);
    if !matches!(act, Act::Forget(_)) {
        half_done(&fixture);
        (gone, stay) = (BTreeSet::new(), names[1..].to_vec());
    }
    let aside = tempfile::tempdir().expect("a directory");
    copy_all(&fixture.directory(), aside.path());
    SPACE_IS_NOT_CHECKED.set(true);
    let mut ends = Vec::new();
    for pages in (0..).step_by(step) {
        fs::remove_dir_all(fixture.directory()).expect("removed");
        fs::create_dir(fixture.directory()).expect("created");
        copy_all(aside.path(), &fixture.directory());
        disk.leave(pages * PAGE);
        let result = act.run(&mut fixture, &gone);
        let there = fixture.check_content();
        let context = format!("{act:?}, {pages} pages: {result:?}");
        assert!(stay.iter().all(|name| there.contains(name)), "{context}");
        fixture.check_verified(&context);
        // Whoever writes next may find no space, either.
        drop(ChainWriter::open(fixture.dest.path(), &fixture.image));
        fixture.check_content();
        disk.resize(PLENTY);
        let rest = gone.iter().copied().filter(|name| there.contains(name));
        let again = fixture.forget(&rest.collect(), Reuse::Always);
        again.unwrap_or_else(|error| panic!("{context}: {error:?}"));
        fixture.check_all(&stay);
        match result {
            Ok(()) => break,
            Err(error) => ends.push(end(&error)),
        }
        assert!(pages < 2000, "it never fits");
    }
    SPACE_IS_NOT_CHECKED.set(false);
    ends.dedup();
    assert!(ends.len() > 1, "the space has always ended at the same place: {ends:?}");
}

/// Where a merge has ended for lack of space.
fn end(error: &MergeError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    assert!(text.contains("No space left on device"), "{text}");
    text
}

fn packed() -> Form {
    Form { compression: Compression::Zstd { level: None }, ..plain() }
}

#[test]
fn copies_that_do_not_fit() {
    wherever_the_space_ends(&plain(), Act::Forget(Reuse::Never), 3);
    wherever_the_space_ends(&packed(), Act::Forget(Reuse::Never), 1);
}

#[test]
fn layers_above_one_that_is_reused_that_do_not_fit() {
    wherever_the_space_ends(&plain(), Act::Forget(Reuse::Always), 1);
    wherever_the_space_ends(&packed(), Act::Forget(Reuse::Always), 1);
}

#[test]
fn what_is_taken_over_does_not_fit() {
    wherever_the_space_ends(&plain(), Act::TakeOver, 1);
    wherever_the_space_ends(&packed(), Act::TakeOver, 1);
}

/// Each waits for half a second for the reader.
#[test]
fn what_is_copied_after_all_does_not_fit() {
    wherever_the_space_ends(&plain(), Act::Copy, 20);
}
