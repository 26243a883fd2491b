//! The program from outside, where no cluster is needed.

#[path = "cli/program.rs"]
mod program;
#[path = "cli/usage.rs"]
mod usage;
