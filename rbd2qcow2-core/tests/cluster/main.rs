//! Tests on a real Ceph cluster: `scripts/ceph-cluster run DIR -- cargo test -p rbd2qcow2-core`.

// Images of tests are small, and what goes wrong is printed for whoever reads the test's output.
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, clippy::cast_possible_truncation)]

mod backup_cases;
mod backup_model;
// Shared with the tests of the program, which need other parts of it.
#[allow(dead_code)]
mod cluster;
mod diff_truth;
// Complete, whichever commands the tests of the day need.
#[allow(dead_code)]
mod driver;
mod driver_check;
mod handles;
mod held;
mod histories;
mod prune_cases;
mod random;
mod restore_cases;
mod store;
mod verify_source;
