//! The program from outside, where no cluster is needed.

#[path = "cli/directory.rs"]
mod directory;
#[path = "cli/list.rs"]
mod list;
#[path = "cli/program.rs"]
mod program;
#[path = "cli/usage.rs"]
mod usage;
