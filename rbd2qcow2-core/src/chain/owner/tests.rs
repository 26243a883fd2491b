use std::os::unix::fs::{PermissionsExt, chown};

use super::*;

/// Whether files can be given to others here, as root can.
fn can_give() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        use std::io::Write;
        _ = writeln!(io::stderr(), "SKIPPED: only root can give files to others");
    }
    root
}

const OTHER: Owner = Owner { uid: 4321, gid: 4322 };

fn owner(path: &Path) -> Owner {
    Owner::of(&fs::symlink_metadata(path).expect("there"))
}

fn make(path: &Path, owner: Owner) {
    fs::write(path, b"x").expect("written");
    chown(path, Some(owner.uid), Some(owner.gid)).expect("given");
}

fn made(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).expect("made")
}

#[test]
fn layers_tell_whose_the_others_are() {
    if !can_give() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let own = owner(directory.path());
    assert_eq!(Owner::of_layers_in(directory.path()).expect("read"), own);
    make(&path("notes.txt"), OTHER);
    assert_eq!(Owner::of_layers_in(directory.path()).expect("read"), own, "that is no layer");
    make(&path("vm@20261122T173312Z.qcow2"), OTHER);
    make(&path("vm@20261123T173312Z.qcow2"), OTHER);
    assert_eq!(Owner::of_layers_in(directory.path()).expect("read"), OTHER);
    let new = path(".vm@20261124T173312Z.qcow2.partial");
    as_neighbours(&made(&new), &new);
    assert_eq!(owner(&new), OTHER);
    // One that somebody has put there does not make him the owner of what comes.
    make(&path("vm@20261124T173312Z.qcow2"), own);
    assert_eq!(Owner::of_layers_in(directory.path()).expect("read"), own);
    fs::remove_file(path("vm@20261124T173312Z.qcow2")).expect("removed");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).expect("changed");
    assert_eq!(Owner::of_layers_in(directory.path()).expect("read"), own, "anybody may have put them there");
}

#[test]
fn directories_tell_whose_a_new_one_is() {
    if !can_give() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    chown(dest.path(), Some(OTHER.uid), Some(OTHER.gid)).expect("given");
    let directory = dest.path().join("vm");
    crate::chain::durable::create_directory(&directory, dest.path()).expect("created");
    assert_eq!(owner(&directory), OTHER);
    let third = Owner { uid: 77, gid: 78 };
    chown(&directory, Some(third.uid), Some(third.gid)).expect("given");
    let directory = dest.path().join("vm2");
    crate::chain::durable::create_directory(&directory, dest.path()).expect("created");
    assert_eq!(owner(&directory), third);
}

#[test]
fn only_what_is_ours_alone_is_given_away() {
    if !can_give() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (precious, link) = (directory.path().join("precious"), directory.path().join("link"));
    fs::write(&precious, b"x").expect("written");
    fs::hard_link(&precious, &link).expect("linked");
    OTHER.take(&made(&link)).expect_err("it has another name");
    let theirs = directory.path().join("theirs");
    make(&theirs, Owner { uid: 77, gid: 78 });
    OTHER.take(&made(&theirs)).expect_err("it is not ours");
    assert_eq!((owner(&precious).uid, owner(&theirs).uid), (0, 77));
}
