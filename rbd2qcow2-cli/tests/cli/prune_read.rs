//! `prune` of a chain whose large root goes, while others read: they see no difference, whenever they have
//! opened what they read.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tempfile::TempDir;

use crate::cluster::say;
use crate::killed::{Random, count};
use crate::large::{Chain, FORMS, Reached, Reader, convert, scratch};
use crate::prune_killed::{SCENES, half_done};
use crate::rig::{Running, names_in};

/// Stock QEMU reads points all the while, one after the other, and the chain grows and is pruned.
#[test]
fn over_and_over_again() {
    const TEST: &str = "prune_read::over_and_over_again";
    let mut random = Random::of_this_run(TEST);
    for form in 0..FORMS.len() {
        let mut chain = Chain::new(form);
        let root = chain.inode(&chain.names()[0]);
        let (directory, truths) = (chain.directory(), Mutex::new(Vec::new()));
        let stay = |chain: &Chain| {
            let names = chain.names();
            let stay = names[names.len() - 3..].iter();
            stay.map(|name| (name.clone(), chain.truth(name))).collect::<Vec<_>>()
        };
        // Those that outlive the prune that goes on, and are there already.
        *truths.lock().unwrap() = stay(&chain);
        let (end, reads, again) = (AtomicBool::new(false), Mutex::new(0), Mutex::new(0));
        let mut reused = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let out = scratch();
                for turn in 0.. {
                    if end.load(Relaxed) {
                        break;
                    }
                    let (name, truth) = {
                        let truths = truths.lock().unwrap();
                        truths[turn % truths.len()].clone()
                    };
                    let layer = directory.join(format!("vm@{name}.qcow2"));
                    match convert(&layer, &out.path().join("raw")) {
                        Ok(content) => {
                            assert!(content == fs::read(&truth).unwrap(), "{name} reads as something else");
                            *reads.lock().unwrap() += 1;
                        }
                        // One that it was about to open has got another name, or is gone.
                        Err(said) => {
                            // The point may have gone since.
                            let is_there = truths.lock().unwrap().iter().any(|(there, _)| *there == name);
                            assert!(said.contains("No such file or directory"), "{is_there}: {said}");
                            *again.lock().unwrap() += 1;
                        }
                    }
                }
            });
            let _end = End(&end);
            for _ in 0..count(3) {
                chain.back_up(&mut random);
                *truths.lock().unwrap() = stay(&chain);
                SCENES[1].prune(&chain);
                let oldest = &stay(&chain)[0].0;
                reused += usize::from(chain.inode(oldest) == root);
                assert_eq!(chain.points().len(), 3);
            }
        });
        let names: Vec<_> = stay(&chain).into_iter().map(|(name, _)| name).collect();
        chain.assert_only(&names);
        let (reads, again) = (reads.into_inner().unwrap(), again.into_inner().unwrap());
        say(&format!("{TEST}: {reads} reads, {again} began again; {reused} of {} roots reused", count(3)));
        assert!(reads > 0, "nothing was read meanwhile");
    }
}

/// Has a thread end, also where this one fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Who has a point open when a prune begins reads on, of a point that stays and of one that goes.
#[test]
fn from_before_it() {
    for (form, scene) in SCENES.into_iter().enumerate().take(FORMS.len()) {
        let chain = scene.chain(form);
        let names = chain.names();
        let stay = scene.stay(&chain);
        let root = chain.inode(&names[0]);
        let open = [&names[0], &stay[0], stay.last().unwrap()];
        let readers = open.map(|name| Reader::open(&chain.layer(name)).expect("nobody is at work"));
        scene.prune(&chain);
        assert_ne!(chain.inode(&stay[0]), root, "a layer was changed that others had open");
        for (reader, name) in readers.iter().zip(open) {
            reader.assert_reads(&chain.truth(name), name);
        }
        chain.assert_only(&stay);
        drop(readers);
        chain.assert_only(&stay);
    }
}

/// Who has opened a point between the steps reads on when the next run has gone on.
#[test]
fn from_between_its_steps() {
    let mut random = Random::of_this_run("prune_read::from_between_its_steps");
    for form in 0..FORMS.len() {
        let scene = SCENES[1 + form];
        let chain = half_done(scene, form, &mut random);
        let stay = scene.stay(&chain);
        let readers = [&stay[0], stay.last().unwrap()]
            .map(|name| (name, Reader::open(&chain.layer(name)).expect("nobody is at work")));
        let base =
            names_in(&chain.directory()).into_iter().find(|name| name.ends_with(".qcow2.base")).unwrap();
        let base = chain.directory().join(base).metadata().unwrap().ino();
        scene.prune(&chain);
        assert_ne!(chain.inode(&stay[0]), base, "a layer was changed that others had open");
        for (name, reader) in &readers {
            reader.assert_reads(&chain.truth(name), name);
        }
        chain.assert_only(&stay);
    }
}

/// Who opens a point at any moment reads it as it is, also when the prune has ended.
#[test]
fn from_any_moment() {
    const TEST: &str = "prune_read::from_any_moment";
    let mut random = Random::of_this_run(TEST);
    let (mut opened, mut meanwhile, mut reused) = (0, 0, 0);
    for round in 0..count(4) {
        let (form, scene) = (round % FORMS.len(), SCENES[round % SCENES.len()]);
        // What was half done before is the more interesting half.
        let chain = if round % 2 == 0 { scene.chain(form) } else { half_done(scene, form, &mut random) };
        let root = inodes(&chain.directory()).into_iter().max_by_key(|(_, bytes)| *bytes).unwrap().0;
        let stay = scene.stay(&chain);
        let mut running = Running::start(chain.command(scene.words));
        let mut readers = Vec::new();
        while !running.has_ended() {
            std::thread::sleep(random.time_below(std::time::Duration::from_millis(40)));
            let name = &stay[random.below(stay.len() as u64) as usize];
            readers.extend(Reader::open(&chain.layer(name)).map(|reader| (name.clone(), reader)));
            meanwhile += usize::from(!running.has_ended());
            // Only the first few are sure to be there before a root is put into its place.
            if readers.len() > 4 {
                readers.remove(0);
            }
        }
        let run = running.wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        for (name, reader) in &readers {
            reader.assert_reads(&chain.truth(name), name);
        }
        opened += readers.len();
        reused += usize::from(chain.inode(&stay[0]) == root);
        chain.assert_only(&stay);
    }
    say(&format!("{TEST}: {opened} compared, {meanwhile} opened meanwhile; {reused} reused"));
    assert!(meanwhile > 0, "no prune was at work when a point was opened");
}

/// The inodes of the files in a directory, and how long they are.
fn inodes(directory: &Path) -> Vec<(u64, u64)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    entries.map(|metadata| (metadata.ino(), metadata.len())).collect()
}

/// A copy of the directory that shares its files with it does not change, whenever it was made.
#[test]
fn copies_by_hard_links_stay() {
    let mut random = Random::of_this_run("prune_read::copies_by_hard_links_stay");
    for (form, scene) in [(0, SCENES[0]), (1, SCENES[1])] {
        for between in [false, true] {
            let chain = if between { half_done(scene, form, &mut random) } else { scene.chain(form) };
            let copy = TempDir::new_in(chain.backups.path().parent().unwrap()).unwrap();
            let names = names_in(&chain.directory());
            for name in &names {
                fs::hard_link(chain.directory().join(name), copy.path().join(name)).unwrap();
            }
            let contents = || names.iter().map(|name| fs::read(copy.path().join(name)).unwrap()).collect();
            let before: Vec<_> = contents();
            scene.prune(&chain);
            let stay = scene.stay(&chain);
            chain.assert_only(&stay);
            let after: Vec<_> = contents();
            for (name, (before, after)) in names.iter().zip(before.into_iter().zip(after)) {
                assert!(name == ".lock" || before == after, "{name} of the copy has changed");
            }
            assert!(!between || names.iter().any(|name| name.ends_with(".base")));
            assert_eq!(chain.reached(), Reached::Done);
        }
    }
}
