//! Bases that have begun to take over what is above them when somebody opens them.

use super::*;
use crate::layer::Compression;
use crate::layer::native::testing::Form;

fn packed() -> Form {
    Form { compression: Compression::Zstd { level: None }, ..plain() }
}

/// The base in the image's directory, if there is one.
fn base(fixture: &Fixture) -> Option<PathBuf> {
    let entries = fs::read_dir(fixture.directory()).expect("listed");
    let mut paths = entries.map(|entry| entry.expect("an entry").path());
    paths.find(|path| path.to_string_lossy().ends_with(".qcow2.base"))
}

/// However far a base has come: where somebody has it open when the next run comes, it is copied after all,
/// with what is above it, and does not change any more.
#[test]
fn whoever_reads_one_has_it_copied() {
    // Each waits for half a second, in the hope that nobody reads any more.
    let every = if std::env::var("RBD2QCOW2_LONG").is_ok_and(|value| value == "1") { 1 } else { 6 };
    for (first, form) in [plain(), packed()].into_iter().enumerate() {
        let make = || Fixture::empty("vm").with_small_changes(4, &form);
        let mut clean = make();
        let names = clean.names();
        let gone = BTreeSet::from([names[0], names[1]]);
        fault::plan(None);
        clean.forget(&gone, Reuse::Always).expect("forgotten");
        let steps = fault::steps();
        let mut copied = 0;
        let begun = steps.iter().position(|step| step.starts_with("write to")).expect("taken over");
        for (at, step) in steps.iter().enumerate().skip(begun - 12 + 3 * first).step_by(every) {
            let mut fixture = make();
            fault::plan(Some((at, Fault::Crash)));
            let result = fixture.forget(&gone, Reuse::Always);
            fault::steps();
            drop(fixture.writer());
            let reader = base(&fixture).map(|path| (fs::read(&path), fs::File::open(path).expect("opened")));
            let context = format!("a crash at step {at}, {step}: {result:?}");
            fixture.check_verified(&context);
            fixture.complete().unwrap_or_else(|error| panic!("{context}: {error:?}"));
            let there = fixture.check_content();
            fixture.check_all(&there);
            if let Some((before, mut file)) = reader {
                let mut after = Vec::new();
                std::io::Read::read_to_end(&mut file, &mut after).expect("read");
                assert!(after == before.expect("read"), "{context}: it has changed");
                copied += 1;
            }
        }
        assert!(copied > 3, "{copied} of {steps:?}");
    }
}

/// Where layers above are merged that need what it holds, what it shows counts as verified.
#[test]
fn what_it_shows_can_be_merged() {
    let mut fixture = Fixture::empty("vm").with_small_changes(5, &packed());
    let names = fixture.names();
    fixture.forget(&[names[0], names[2]].into(), Reuse::Always).expect("forgotten");
    fixture.check_all(&[names[1], names[3], names[4]]);
}
