//! The NBD protocol, as far as a client that writes and reads a disk image needs it.
//!
//! [`wire`] turns bytes into structures and back; [`handshake`] agrees with a server on an export;
//! [`reply`] reads and validates what the server answers; [`client`] keeps many requests under way
//! over several connections; [`server_process`] starts a `qemu-nbd` that cannot outlive its client.
//!
//! The protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. Not spoken:
//! TLS, oldstyle negotiation, extended headers, trim and cache commands.

pub mod client;
mod error;
pub mod handshake;
pub mod reply;
pub mod server_process;
pub mod wire;

pub use error::{NbdError, Operation, Violation};
