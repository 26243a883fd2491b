//! The program from outside: where no cluster is needed, and on one that
//! `scripts/ceph-cluster run DIR -- cargo test -p rbd2qcow2-cli` starts.

// The modules that core's tests own are written for themselves.
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr, clippy::cast_possible_truncation)]

#[path = "cli/backup.rs"]
mod backup;
#[path = "cli/bad_day.rs"]
mod bad_day;
#[path = "cli/boot.rs"]
mod boot;
// What the tests of the library have, they share with these.
#[allow(dead_code)]
#[path = "../../rbd2qcow2-core/tests/cluster/cluster.rs"]
mod cluster;
#[path = "cli/directory.rs"]
mod directory;
#[path = "cli/disks.rs"]
mod disks;
#[allow(dead_code)]
#[path = "../../rbd2qcow2-core/tests/cluster/driver.rs"]
mod driver;
#[path = "cli/faults.rs"]
mod faults;
#[path = "cli/frozen.rs"]
mod frozen;
#[path = "cli/killed.rs"]
mod killed;
#[path = "cli/large.rs"]
mod large;
#[path = "cli/list.rs"]
mod list;
#[path = "cli/long_chains.rs"]
mod long_chains;
#[path = "cli/lost.rs"]
mod lost;
#[path = "cli/mount.rs"]
mod mount;
#[path = "cli/program.rs"]
mod program;
#[path = "cli/prune.rs"]
mod prune;
#[path = "cli/prune_disks.rs"]
mod prune_disks;
#[path = "cli/prune_killed.rs"]
mod prune_killed;
#[path = "cli/prune_read.rs"]
mod prune_read;
#[path = "cli/restore.rs"]
mod restore;
#[path = "cli/restore_rbd.rs"]
mod restore_rbd;
#[path = "cli/rig.rs"]
mod rig;
#[path = "cli/serve.rs"]
mod serve;
#[path = "cli/usage.rs"]
mod usage;
#[path = "cli/users.rs"]
mod users;
#[path = "cli/verify.rs"]
mod verify;
#[path = "cli/vm.rs"]
mod vm;
#[path = "cli/writers.rs"]
mod writers;
