//! The input is everything that a server answers to a fixed set of requests. Its first byte says
//! whether structured replies were agreed upon.
#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::nbd::reply::{PendingReply, Progress, ReplyReader, Yield};
use rbd2qcow2_core::nbd::wire::Command;

/// Number of the metadata context that block status reports.
const CONTEXT: u32 = 5;

/// Requests in flight, by cookie from 1 on: command, offset, length.
const REQUESTS: [(Command, u64, u32); 7] = [
    (Command::Read, 0, 16),
    (Command::Read, 4096, 1024),
    (Command::Read, (1 << 63) - 65_536 - 1, 65_536),
    (Command::Write, 512, 512),
    (Command::WriteZeroes, 0, 1 << 30),
    (Command::Flush, 0, 0),
    (Command::BlockStatus, 1 << 40, 1 << 20),
];

fuzz_target!(|input: &[u8]| {
    let Some((structured, says)) = input.split_first() else { return };
    let mut in_flight: HashMap<u64, PendingReply> = (1..)
        .zip(REQUESTS)
        .map(|(cookie, (command, offset, length))| {
            (cookie, PendingReply::new(command, offset, length, CONTEXT))
        })
        .collect();
    let mut replies = ReplyReader::new(says, structured & 1 != 0);
    while let Ok(Some(header)) = replies.header() {
        let Some(mut pending) = in_flight.remove(&header.cookie()) else { return };
        let operation = pending.operation();
        match replies.content(&header, &mut pending) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return;
            }
            Ok(Progress::More) => {
                in_flight.insert(header.cookie(), pending);
            }
            Ok(Progress::Done(Err(failure))) => assert!(failure.errno.0 != 0),
            Ok(Progress::Done(Ok(found))) => {
                check(operation.command, operation.offset, operation.length, found)
            }
        }
    }
});

/// A good reply must be a whole one.
fn check(command: Command, offset: u64, length: u64, found: Yield) {
    match (command, found) {
        (Command::Read, Yield::Data(bytes)) => assert_eq!(bytes.len() as u64, length),
        (Command::BlockStatus, Yield::Extents(extents)) => {
            let mut at = offset;
            for extent in &extents {
                assert!(extent.offset == at && extent.length > 0 && at < offset + length);
                at += extent.length;
            }
            assert!(at > offset);
        }
        (Command::Write | Command::WriteZeroes | Command::Flush, Yield::Nothing) => {}
        (command, found) => panic!("{found:?} for a {command}"),
    }
}
