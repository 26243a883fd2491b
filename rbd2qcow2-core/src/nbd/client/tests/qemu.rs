//! The client and stock qemu-nbd.

use std::path::Path;

use super::*;
use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{qemu_img, qemus};
use crate::nbd::server_process::{ServerCommand, ServerProcess};

const SIZE: usize = (8 << 20) + 512;

fn serve(tools: &QemuTools, directory: &Path, file: &str, format: &str) -> (ServerProcess, Vec<UnixStream>) {
    let command = ServerCommand {
        program: tools.qemu_nbd().to_owned(),
        arguments: ["-f", format, file].map(Into::into).into(),
        directory: directory.to_owned(),
        connections: 4,
    };
    ServerProcess::start(&command).expect("started")
}

#[test]
fn random_writes_and_reads_equal_the_model() {
    for (tools, format) in qemus().into_iter().flat_map(|tools| [(tools.clone(), "raw"), (tools, "qcow2")]) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        qemu_img(&tools, directory.path(), &["create", "-q", "-f", format, "disk", &SIZE.to_string()]);
        let (server, streams) = serve(&tools, directory.path(), "disk", format);
        let client = Client::connect(streams, &options()).expect("connected");
        assert_eq!(client.connections(), 4);
        let mut random = Random::new(3);
        let mut model = vec![0; SIZE];
        for _ in 0..60 {
            let from = 512 * usize::try_from(random.below(SIZE as u64 / 512)).expect("small");
            let length = 512 * usize::try_from(random.below(2000)).expect("small");
            let to = SIZE.min(from + length);
            if random.below(3) == 0 {
                model[from..to].fill(0);
                let zero = ZeroOptions { no_hole: random.below(2) == 0, fast: random.below(2) == 0 };
                client.write_zeroes(from as u64, (to - from) as u64, zero).expect("queued");
            } else {
                model[from..to].copy_from_slice(&random.bytes(to - from));
                client.write(from as u64, Bytes::copy_from_slice(&model[from..to])).expect("queued");
            }
            // The next range may overlap this one, and requests are not ordered.
            client.drain().expect("drained");
        }
        client.flush().expect("flushed");
        let mut read = vec![1; SIZE];
        client.read(0, &mut read).expect("read");
        assert!(read == model, "{format}");
        let status = client.block_status(0, SIZE as u64).expect("status");
        assert_eq!(status.iter().map(|extent| extent.length).sum::<u64>(), SIZE as u64);
        for extent in status.iter().filter(|extent| extent.zero) {
            let from = usize::try_from(extent.offset).expect("small");
            let bytes = &model[from..from + usize::try_from(extent.length).expect("small")];
            assert!(bytes.iter().all(|byte| *byte == 0), "{extent:?} is no zeroes");
        }
        client.disconnect().expect("disconnected");
        let exit = server.exit_within(SOON).expect("it leaves with its last client");
        assert!(exit.success(), "{exit}");
        qemu_img(&tools, directory.path(), &["convert", "-f", format, "-O", "raw", "disk", "raw"]);
        assert!(std::fs::read(directory.path().join("raw")).expect("readable") == model, "{format}");
    }
}

#[test]
fn connections_that_were_never_used_do_not_keep_the_server() {
    for tools in qemus() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        qemu_img(&tools, directory.path(), &["create", "-q", "-f", "raw", "disk", "1M"]);
        for _ in 0..5 {
            let (server, mut streams) = serve(&tools, directory.path(), "disk", "raw");
            streams.truncate(1);
            let client = Client::connect(streams, &options()).expect("connected");
            client.disconnect().expect("disconnected");
            assert!(server.exit_within(SOON).is_some_and(|exit| exit.success()));
        }
    }
}

#[test]
fn an_unknown_export_is_told_with_the_servers_words() {
    for tools in qemus() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        qemu_img(&tools, directory.path(), &["create", "-q", "-f", "raw", "disk", "1M"]);
        let (_server, streams) = serve(&tools, directory.path(), "disk", "raw");
        let options = ClientOptions { export: "nothing".into(), ..options() };
        let error = Client::connect(streams, &options).expect_err("no such export").to_string();
        assert!(error.contains("no such export"), "{error}");
    }
}
