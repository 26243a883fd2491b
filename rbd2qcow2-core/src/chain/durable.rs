//! The only code that creates, syncs, renames and removes the files of a chain.
//!
//! A file comes into being in this order, and each step is there for a reason:
//! 1. it is created aside, under a name that no reader takes for a file of the chain, and only if
//!    nothing has that name;
//! 2. it is written, made read-only and fsynced: a rename may reach the disk before the data of the
//!    renamed file does, and then a power failure leaves a complete-looking file without content;
//! 3. it is renamed, without replacing anything: readers see all of it or nothing;
//! 4. the directory is fsynced: until then the new name may be lost, and whoever relies on the name
//!    (by renaming a file that needs this one, by deleting an old snapshot) must wait for that.
//!
//! Every operation is one step for the fault injector of the tests, which crash the program before
//! each of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, Mode, RenameFlags};
use rustix::io::Errno;

use super::error::ChainError;
use super::owner::{self, Owner};

mod in_place;

pub(crate) use in_place::InPlace;

/// Creates a file that nobody but its owner can read, for writing. It must not exist.
///
/// # Errors
/// [`ChainError::Io`], also when something has that name.
pub fn create_aside(path: &Path) -> Result<File, ChainError> {
    fault::step("create", path).map_err(ChainError::io("create", path))?;
    // O_EXCL follows no symbolic link either.
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.map_err(ChainError::io("create", path))
}

/// Creates a file of the given content and [`seal`]s it. Removes it again when that fails.
///
/// # Errors
/// [`ChainError::Io`].
pub fn write_aside(path: &Path, content: &[u8]) -> Result<(), ChainError> {
    let mut file = create_aside(path)?;
    let written = file.write_all(content).map_err(ChainError::io("write", path));
    written.and_then(|()| seal(&file, path)).inspect_err(|_| {
        // The first error is the one to report; the next run removes what stays.
        _ = remove(path);
    })
}

/// Makes an open file read-only for its owner and nobody else's (mode 0400), gives it to the owner of the
/// files beside it where that is possible, and brings it to stable storage. Blocks until the disk has it.
///
/// # Errors
/// [`ChainError::Io`]. The file's content is then unknown: a second fsync may well succeed without
/// having written anything.
pub fn seal(file: &File, path: &Path) -> Result<(), ChainError> {
    fault::step("seal", path).map_err(ChainError::io("sync", path))?;
    rustix::fs::fchmod(file, Mode::RUSR).map_err(ChainError::io("make read-only", path))?;
    owner::as_neighbours(file, path);
    file.sync_all().map_err(ChainError::io("sync", path))
}

/// Gives a file that is to replace `old` the owner and the mode of that one, but for the right to write,
/// and brings that to stable storage. Where it cannot have that owner, a warning says so.
///
/// # Errors
/// [`ChainError::Io`]. The file may have another owner or mode then.
pub fn take_after(path: &Path, old: &Path) -> Result<(), ChainError> {
    fault::step("take after", path).map_err(ChainError::io("give the owner of the old file to", path))?;
    let (file, _) = in_place::regular(path)?;
    let before = match fs::symlink_metadata(old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(ChainError::io("look at", old))?,
    };
    if let Err(error) = Owner::of(&before).take(&file) {
        owner::tell(path, &error, true);
    }
    let mode = Mode::from_raw_mode(before.mode() & 0o555);
    rustix::fs::fchmod(&file, mode).map_err(ChainError::io("give the mode of the old file to", path))?;
    file.sync_all().map_err(ChainError::io("sync", path))
}

/// Renames a file within a directory. The new name must be free.
///
/// Durable only after [`sync_directory`].
///
/// # Errors
/// [`ChainError::Io`]; the file then has its old name.
pub fn rename_new(from: &Path, to: &Path) -> Result<(), ChainError> {
    fault::step("rename", to).map_err(ChainError::io("rename into place", to))?;
    let renamed = match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // NFS and some FUSE file systems cannot. The chain's lock keeps other runs away meanwhile.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match fs::symlink_metadata(to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::rename(from, to),
            Err(error) => Err(error),
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        },
        other => other.map_err(io::Error::from),
    };
    // Over a network the answer may be lost, and the second attempt then finds nothing to rename.
    let is_done = || is_absent(from) && fs::symlink_metadata(to).is_ok();
    renamed
        .or_else(|error| if is_done() { Ok(()) } else { Err(error) })
        .map_err(ChainError::io("rename into place", to))
}

fn is_absent(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Renames a file within a directory, over whatever has the new name.
///
/// Durable only after [`sync_directory`].
///
/// # Errors
/// [`ChainError::Io`]; both files are then as before.
pub fn replace(from: &Path, to: &Path) -> Result<(), ChainError> {
    fault::step("replace", to).map_err(ChainError::io("replace", to))?;
    fs::rename(from, to).map_err(ChainError::io("replace", to))
}

/// Gives a file a second name. That must be free.
///
/// Durable only after [`sync_directory`].
///
/// # Errors
/// [`ChainError::Io`]; also on a file system without hard links.
pub fn link(from: &Path, to: &Path) -> Result<(), ChainError> {
    fault::step("link", to).map_err(ChainError::io("give a second name to the file as", to))?;
    fs::hard_link(from, to).map_err(ChainError::io("give a second name to the file as", to))
}

/// Brings the names in a directory to stable storage. Blocks until the disk has them.
///
/// # Errors
/// [`ChainError::Io`]. A file system that knows no such operation is no error: there is no more that
/// could be done.
pub fn sync_directory(directory: &Path) -> Result<(), ChainError> {
    fault::step("sync directory", directory).map_err(ChainError::io("sync the directory", directory))?;
    let opened = File::open(directory).map_err(ChainError::io("open the directory", directory))?;
    match rustix::fs::fsync(&opened) {
        Err(Errno::INVAL | Errno::NOTSUP) => {
            log::debug!("{} is on a file system that cannot sync directories", directory.display());
            Ok(())
        }
        other => other.map_err(ChainError::io("sync the directory", directory)),
    }
}

/// Creates a directory, if there is none, and brings its name to stable storage.
///
/// A new one belongs to the owner of those beside it, as far as that is possible. Others than its group may not even
/// list it (mode 0750): the files in it are machines' disks, and their names tell which there are. A group may,
/// since it can be given the files, too, for a machine that reads backups without being root.
///
/// Its parent is synced even when it was there: the run that created it may have been killed before
/// it came to that.
///
/// # Errors
/// [`ChainError::Io`].
pub fn create_directory(directory: &Path, parent: &Path) -> Result<(), ChainError> {
    fault::step("create directory", directory).map_err(ChainError::io("create the directory", directory))?;
    match fs::DirBuilder::new().mode(0o750).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(ChainError::io("create the directory", directory)(error)),
        Ok(()) => {
            let given = Owner::of_images_in(parent, directory).and_then(|owner| {
                // Not through a link that somebody has put in its place.
                let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::DIRECTORY;
                let mut options = File::options();
                options.read(true).custom_flags(flags.bits().cast_signed());
                owner.take(&options.open(directory)?)
            });
            if let Err(error) = given {
                // It is his who has made it, then.
                owner::tell(directory, &error, false);
            }
        }
    }
    sync_directory(parent)
}

/// Removes a file; tells whether it was there.
///
/// Durable only after [`sync_directory`].
///
/// # Errors
/// [`ChainError::Io`].
pub fn remove(path: &Path) -> Result<bool, ChainError> {
    fault::step("remove", path).map_err(ChainError::io("remove", path))?;
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(ChainError::io("remove", path)(error)),
    }
}

/// Outside of tests nothing is injected.
#[cfg(not(test))]
mod fault {
    use std::io;
    use std::path::Path;

    #[expect(clippy::unnecessary_wraps, reason = "its twin for the tests fails")]
    pub(super) fn step(_: &str, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// Stops the program at a chosen step, for tests. Faults belong to the thread that asked for them.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::RefCell;
    use std::io;
    use std::path::Path;

    /// What happens at the chosen step.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Fault {
        /// The step fails, the program goes on.
        Fail,
        /// This step and all later ones do nothing, as if the process had died before it.
        Crash,
        /// The step fails, and so many steps later the process dies.
        FailThenCrash(usize),
        /// The process is killed before the step.
        Kill,
    }

    #[derive(Default)]
    struct Injector {
        /// The steps so far, as `operation file-name`.
        steps: Vec<String>,
        /// Which step, counted from 0, meets which fault.
        fault: Option<(usize, Fault)>,
    }

    thread_local! {
        static INJECTOR: RefCell<Injector> = RefCell::default();
    }

    /// Forgets the steps so far and plans a fault.
    pub(crate) fn plan(fault: Option<(usize, Fault)>) {
        INJECTOR.with_borrow_mut(|injector| *injector = Injector { steps: Vec::new(), fault });
    }

    /// Ends all faults and returns the steps since [`plan`], the refused ones included.
    pub(crate) fn steps() -> Vec<String> {
        INJECTOR.with_borrow_mut(|injector| std::mem::take(injector).steps)
    }

    pub(super) fn step(operation: &str, path: &Path) -> io::Result<()> {
        INJECTOR.with_borrow_mut(|injector| {
            let number = injector.steps.len();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            injector.steps.push(format!("{operation} {name}"));
            match injector.fault {
                Some((at, Fault::Fail | Fault::FailThenCrash(_))) if number == at => {
                    Err(io::Error::other("injected failure"))
                }
                Some((at, Fault::FailThenCrash(later))) if number > at + later => {
                    Err(io::Error::other("injected crash"))
                }
                Some((at, Fault::Crash)) if number >= at => Err(io::Error::other("injected crash")),
                Some((at, Fault::Kill)) if number == at => {
                    let own = rustix::process::getpid();
                    rustix::process::kill_process(own, rustix::process::Signal::KILL)?;
                    Err(io::Error::other("survived SIGKILL"))
                }
                _ => Ok(()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::fault::Fault;
    use super::*;

    #[test]
    fn written_files_are_read_only_and_never_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let (aside, place) = (directory.path().join(".a.partial"), directory.path().join("a"));
        write_aside(&aside, b"one").expect("written");
        let mode = fs::metadata(&aside).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o400);
        rename_new(&aside, &place).expect("renamed");
        write_aside(&aside, b"two").expect("written");
        let error = rename_new(&aside, &place).expect_err("the name is taken");
        assert!(error.to_string().starts_with("cannot rename into place "), "{error}");
        assert_eq!(fs::read(&place).expect("there"), b"one");
        replace(&aside, &place).expect("replaced");
        assert_eq!(fs::read(&place).expect("there"), b"two");
        sync_directory(directory.path()).expect("synced");
        assert!(remove(&place).expect("removed"));
        assert!(!remove(&place).expect("nothing to remove"));
    }

    #[test]
    fn a_new_directory_is_not_for_everybody() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = parent.path().join("vm");
        create_directory(&directory, parent.path()).expect("created");
        let mode = || fs::metadata(&directory).expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode() & 0o707, 0o700);
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("changed");
        create_directory(&directory, parent.path()).expect("it is there");
        assert_eq!(mode(), 0o755, "what is there stays as it is");
    }

    #[test]
    fn a_rename_whose_answer_was_lost_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let (aside, place) = (directory.path().join(".a.partial"), directory.path().join("a"));
        fs::write(&place, b"one").expect("written");
        rename_new(&aside, &place).expect("it is done");
        rename_new(&aside, &directory.path().join("b")).expect_err("there is nothing to rename");
    }

    #[test]
    fn nothing_is_created_through_a_symbolic_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let (link, target) = (directory.path().join("link"), directory.path().join("target"));
        std::os::unix::fs::symlink(&target, &link).expect("a link");
        create_aside(&link).expect_err("the name is taken");
        assert!(!target.exists());
    }

    #[test]
    fn a_file_that_cannot_be_synced_is_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let aside = directory.path().join("aside");
        fault::plan(Some((1, Fault::Fail)));
        write_aside(&aside, b"one").expect_err("the sync fails");
        assert_eq!(fault::steps(), ["create aside", "seal aside", "remove aside"]);
        assert!(!aside.exists());
    }
}
