use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::chain::durable::fault::{self, Fault};
use crate::chain::lock::ChainLock;
use crate::chain::tests::{back_up, create_layer, image, point, qemu_img_is_there};
use crate::chain::{Problem, image_directory};

const POINTS: [&str; 2] = ["20261122T173312Z", "20261123T173307Z"];

/// A destination with two points; `None` where the tools are missing.
fn destination() -> Option<tempfile::TempDir> {
    if !qemu_img_is_there() {
        return None;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    for name in POINTS {
        back_up(&mut writer, point(name)).expect("committed");
    }
    Some(dest)
}

fn because(reason: &str) -> Hold {
    Hold { reason: reason.to_owned(), since: "2026-11-23T18:00:00Z".parse().expect("a time") }
}

/// The holds of all points, where nothing else is wrong.
fn holds(dest: &Path) -> Vec<Option<Hold>> {
    let catalogue = Catalogue::read(&image_directory(dest, &image()), &image()).expect("read");
    assert!(catalogue.problems().is_empty(), "{:?}", catalogue.problems());
    let points = catalogue.points().iter();
    points.map(|point| point.manifest.as_ref().expect("a manifest").hold.clone()).collect()
}

#[test]
fn a_point_is_held_and_released() {
    let Some(dest) = destination() else { return };
    let (dest, name) = (dest.path(), point(POINTS[0]));
    let path = image_directory(dest, &image()).join(format!("vm%2F1@{name}.json"));
    let before = fs::read(&path).expect("readable");
    hold(dest, &image(), name, &because("before the upgrade")).expect("held");
    assert_eq!(holds(dest), [Some(because("before the upgrade")), None]);
    assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o7777, 0o400);
    hold(dest, &image(), name, &because("the audit")).expect("held");
    assert_eq!(holds(dest), [Some(because("the audit")), None]);
    assert_eq!(release(dest, &image(), name).expect("released"), because("the audit"));
    assert_eq!(fs::read(&path).expect("readable"), before);
    let again = release(dest, &image(), name).expect_err("not held");
    assert!(matches!(again, HoldError::NotHeld { .. }), "{again}");
}

#[test]
fn what_cannot_be_held_is_told() {
    let Some(dest) = destination() else { return };
    let (path, name) = (dest.path(), point(POINTS[0]));
    let held = |name, reason: &str| hold(path, &image(), name, &because(reason)).expect_err("refused");
    assert!(matches!(held(name, " \n"), HoldError::NoReason));
    assert!(matches!(held(name, &"x".repeat(REASON_MAX + 1)), HoldError::LongReason { bytes: 1025 }));
    let unknown = held(point("20261122T173313Z"), "x");
    assert!(matches!(&unknown, HoldError::UnknownPoint { known, .. } if known.len() == 2), "{unknown}");
    let other = crate::chain::ImageName::new("other").expect("a name");
    let missing = hold(path, &other, name, &because("x")).expect_err("no such image");
    assert!(matches!(missing, HoldError::Chain(ChainError::NoSuchImage { .. })), "{missing}");
    assert!(!image_directory(path, &other).exists());
    let nowhere = hold(&path.join("nowhere"), &other, name, &because("x")).expect_err("no destination");
    assert!(matches!(nowhere, HoldError::Chain(ChainError::DestinationMissing { .. })), "{nowhere}");

    let directory = image_directory(path, &image());
    let reader = ChainLock::shared(&directory).expect("free");
    let locked = held(name, "x");
    assert!(matches!(locked, HoldError::Chain(ChainError::Locked { .. })), "{locked}");
    drop(reader);

    fs::remove_file(directory.join(format!("vm%2F1@{name}.json"))).expect("removed");
    let lost = held(name, "x");
    assert!(matches!(lost, HoldError::Manifest { cause: ManifestError::Missing, .. }), "{lost}");
    assert!(matches!(release(path, &image(), name), Err(HoldError::Manifest { .. })));
}

#[test]
fn points_of_the_python_tool_are_not_held() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let directory = image_directory(dest.path(), &image());
    fs::create_dir(&directory).expect("created");
    create_layer(&directory.join("empty.qcow2"), 1 << 20, None);
    create_layer(&directory.join("vm%2F1@1795368792.qcow2"), 4 << 20, Some("empty.qcow2"));
    let name = point("1795368792");
    let error = hold(dest.path(), &image(), name, &because("x")).expect_err("no manifest");
    assert!(matches!(error, HoldError::Python { .. }), "{error}");
    assert!(matches!(release(dest.path(), &image(), name), Err(HoldError::Python { .. })));
}

#[test]
fn whenever_it_dies_the_old_or_the_new_hold_is_there() {
    let Some(dest) = destination() else { return };
    let (dest, name) = (dest.path(), point(POINTS[0]));
    let change = || hold(dest, &image(), name, &because("new"));
    fault::plan(None);
    change().expect("nothing is in the way");
    let steps = fault::steps();
    let replaced = steps.iter().position(|step| step.starts_with("replace")).expect("it is replaced");
    for fault in [Fault::Crash, Fault::Fail] {
        for at in 0..steps.len() {
            hold(dest, &image(), name, &because("old")).expect("held");
            fault::plan(Some((at, fault)));
            change().expect_err("told");
            fault::plan(None);
            let expected = if at > replaced { "new" } else { "old" };
            assert_eq!(holds(dest), [Some(because(expected)), None], "step {at} of {steps:?}");
        }
    }
    // What the last crash left is gone with the next change.
    change().expect("held");
    let catalogue = Catalogue::read(&image_directory(dest, &image()), &image()).expect("read");
    assert!(catalogue.leftovers().is_empty(), "{:?}", catalogue.leftovers());
    assert!(!catalogue.problems().iter().any(|problem| matches!(problem, Problem::Foreign { .. })));
}
