//! Layers whose programs, servers, disks or callers fail.

use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use super::*;
use crate::layer::qemu_nbd::testing::{script, skip};

/// The whole chain of an error, as people get to see it.
fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

fn cause(error: LayerError) -> QemuNbdError {
    let (LayerError::Create { cause, .. }
    | LayerError::Write { cause, .. }
    | LayerError::Finish { cause, .. }) = error;
    *cause.downcast().expect("of this module")
}

/// Number of the layer's server.
fn server(layer: &QemuNbdLayer) -> Pid {
    let Phase::Running(running) = &*layer.read_phase() else { panic!("it does not run") };
    let shell = running.supervisor();
    let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).expect("proc is there");
    Pid::from_raw(children.trim().parse().expect("one child")).expect("not 0")
}

fn data(layer: &QemuNbdLayer) -> Bytes {
    Bytes::from(vec![1; usize::try_from(layer.grain()).expect("small")])
}

/// Writes one grain after the other until that fails.
fn write_until_error(layer: &QemuNbdLayer) -> LayerError {
    (0..).find_map(|n| layer.write_data(n * layer.grain(), data(layer)).err()).expect("it fails some time")
}

#[test]
fn impossible_specs_are_refused_and_leave_no_file() {
    for tools in qemus() {
        let directory = directory();
        let good = spec(directory.path(), "layer", 1 << 20);
        let level = Compression::Zstd { level: Some(3) };
        let backing = |name: &str| LayerSpec { backing: Some(name.into()), ..good.clone() };
        let cases = [
            (LayerSpec { compression: level, ..good.clone() }, "level 3"),
            (LayerSpec { virtual_size: 513, ..good.clone() }, "513 bytes is not possible"),
            (LayerSpec { virtual_size: u64::MAX - 511, ..good.clone() }, "is not possible"),
            (LayerSpec { cluster_size: 256, ..good.clone() }, "256 bytes are not possible"),
            (LayerSpec { cluster_size: 65_535, ..good.clone() }, "65535 bytes are not possible"),
            (LayerSpec { cluster_size: 4 << 20, ..good.clone() }, "are not possible"),
            (backing(""), "cannot be the name"),
            (backing("../other.qcow2"), "cannot be the name"),
            (backing("json:{}"), "cannot be the name"),
            // QEMU itself finds the tables too large.
            (LayerSpec { virtual_size: 1 << 60, ..good.clone() }, "qemu-img failed (exit status: 1): "),
            (LayerSpec { path: directory.path().join("no/layer"), ..good.clone() }, "cannot make the file"),
        ];
        for (spec, expected) in cases {
            let error = told(&QemuNbdLayer::create(&spec, options(&tools)).expect_err(expected));
            assert!(error.contains(expected), "{error}");
            assert!(!spec.path.exists());
        }
    }
}

#[test]
fn a_file_that_exists_stays_as_it_is() {
    for tools in qemus() {
        let directory = directory();
        let spec = spec(directory.path(), "layer", 1 << 20);
        fs::write(&spec.path, "precious").expect("written");
        let error = told(&QemuNbdLayer::create(&spec, options(&tools)).expect_err("it exists"));
        assert!(error.contains("File exists"), "{error}");
        assert_eq!(fs::read(&spec.path).expect("readable"), b"precious");
    }
}

#[test]
fn unusable_programs_are_told_with_what_to_do() {
    let directory = directory();
    let spec = spec(directory.path(), "layer", 1 << 20);
    let error = |tools: QemuTools| told(&QemuNbdLayer::create(&spec, options(&tools)).expect_err("unusable"));
    let fine = script(directory.path(), "fine", "echo extended_l2=");
    let old = script(directory.path(), "old", "echo cluster_size=");
    let broken = script(directory.path(), "broken", "echo no library >&2; exit 1");
    let text = directory.path().join("text");
    fs::write(&text, "x").expect("written");
    fs::set_permissions(&text, fs::Permissions::from_mode(0o644)).expect("changed");
    for (qemu_img, qemu_nbd, expected) in [
        (Path::new("/nowhere/qemu-img"), fine.as_path(), "/nowhere/qemu-img was not found: install"),
        (&fine, Path::new("/nowhere/qemu-nbd"), "/nowhere/qemu-nbd was not found: install"),
        (&old, &fine, "old is too old: extended_l2 is missing, which QEMU has since 5.2"),
        (&text, &fine, "is it an executable file?"),
        (&broken, &fine, "broken failed (exit status: 1): no library"),
        (&fine, &broken, "broken failed (exit status: 1): no library"),
    ] {
        let found = error(QemuTools::new(qemu_img, qemu_nbd));
        assert!(found.contains(expected), "{found}");
    }
    assert!(!spec.path.exists());
}

#[test]
fn a_server_that_does_not_start_is_every_calls_answer() {
    for tools in qemus() {
        let directory = directory();
        let qemu_nbd =
            script(directory.path(), "nbd", "[ \"$1\" = --version ] || { echo no way >&2; exit 9; }");
        let tools = QemuTools::new(tools.qemu_img(), qemu_nbd);
        let layer = QemuNbdLayer::create(&spec(directory.path(), "layer", 1 << 20), options(&tools));
        let layer = layer.expect("created");
        for error in [
            layer.write_data(0, data(&layer)).expect_err("no server"),
            layer.write_zeroes(0..1 << 20).expect_err("no server"),
            layer.finish().expect_err("no server"),
        ] {
            let error = told(&error);
            assert!(error.contains("ended with exit status 9, and wrote: no way"), "{error}");
        }
    }
}

#[test]
fn another_way_of_io_is_tried_when_one_does_not_work() {
    for tools in qemus() {
        let directory = directory();
        let asked = directory.path().join("asked");
        let body = format!(
            "echo \"$@\" >> {}\ncase \"$*\" in *io_uring*) echo no rings >&2; exit 1;; esac\nexec {} \"$@\"",
            asked.display(),
            tools.qemu_nbd().display()
        );
        let tools = QemuTools::new(tools.qemu_img(), script(directory.path(), "nbd", &body));
        for name in ["first", "second"] {
            let layer = QemuNbdLayer::create(&spec(directory.path(), name, 1 << 20), options(&tools));
            let layer = layer.expect("created");
            layer.write_data(0, data(&layer)).expect("written");
            layer.finish().expect("finished");
        }
        let asked = fs::read_to_string(asked).expect("written");
        let aios = asked.lines().filter_map(|line| line.split("--aio=").nth(1)?.split(' ').next());
        let aios: Vec<_> = aios.collect();
        // What works is remembered for the next layer. Without O_DIRECT, there is one way only.
        assert!(aios == ["io_uring", "threads", "threads"] || aios == ["threads", "threads"], "{aios:?}");
    }
}

#[test]
fn only_whole_grains_are_taken() {
    for tools in qemus() {
        let directory = directory();
        let spec = spec(directory.path(), "layer", (1 << 20) + 512);
        let layer = QemuNbdLayer::create(&spec, options(&tools)).expect("created");
        let write = |offset, length| layer.write_data(offset, Bytes::from(vec![1; length]));
        for result in [
            write(512, 2048),
            write(0, 512),
            write(1 << 20, 1024),
            write(u64::MAX - 2047, 2048),
            layer.write_zeroes(0..512),
            layer.write_zeroes(2048..(1 << 20) + 2048),
            layer.write_zeroes(Range { start: 4096, end: 2048 }),
        ] {
            let error = cause(result.expect_err("no whole grain"));
            assert!(matches!(error, QemuNbdError::BadRange { grain: 2048, .. }), "{error}");
        }
        write(1 << 20, 512).expect("the ragged end");
        layer.finish().expect("finished");
    }
}

#[test]
fn a_finished_layer_takes_nothing() {
    for tools in qemus() {
        let directory = directory();
        let layer = QemuNbdLayer::create(&spec(directory.path(), "layer", 1 << 20), options(&tools));
        let layer = layer.expect("created");
        layer.finish().expect("finished");
        assert!(matches!(
            cause(layer.write_data(0, data(&layer)).expect_err("finished")),
            QemuNbdError::Finished
        ));
        assert!(matches!(cause(layer.finish().expect_err("finished")), QemuNbdError::Finished));
    }
}

#[test]
fn a_killed_server_is_told_and_never_a_success() {
    for tools in qemus() {
        let directory = directory();
        let make = |name| {
            let layer = QemuNbdLayer::create(&spec(directory.path(), name, 1 << 30), options(&tools));
            let layer = layer.expect("created");
            layer.write_data(0, data(&layer)).expect("written");
            kill_process(server(&layer), Signal::KILL).expect("killed");
            layer
        };
        let layer = make("first");
        let error = told(&write_until_error(&layer));
        assert!(error.contains("was killed by signal 9"), "{error}");
        layer.finish().expect_err("not all was written");
        let error = told(&make("second").finish().expect_err("not all was written"));
        assert!(error.contains("was killed by signal 9"), "{error}");
    }
}

#[test]
fn abort_frees_a_writer_whose_server_hangs() {
    for tools in qemus() {
        let directory = directory();
        let layer = QemuNbdLayer::create(&spec(directory.path(), "layer", 1 << 30), options(&tools));
        let layer = layer.expect("created");
        layer.write_data(0, data(&layer)).expect("written");
        let server = server(&layer);
        kill_process(server, Signal::STOP).expect("stopped");
        thread::scope(|scope| {
            let writer = scope.spawn(|| write_until_error(&layer));
            thread::sleep(Duration::from_millis(200));
            assert!(!writer.is_finished());
            layer.abort();
            let error = cause(writer.join().expect("no panic"));
            assert!(matches!(error, QemuNbdError::Aborted), "{error}");
        });
        assert!(matches!(cause(layer.finish().expect_err("aborted")), QemuNbdError::Aborted));
        drop(layer);
        assert!(!fs::exists(format!("/proc/{server}")).expect("proc is there"), "the server is still there");
    }
}

#[test]
fn abort_before_the_first_write_starts_nothing() {
    for tools in qemus() {
        let directory = directory();
        let layer = QemuNbdLayer::create(&spec(directory.path(), "layer", 1 << 20), options(&tools));
        let layer = layer.expect("created");
        layer.abort();
        assert!(matches!(
            cause(layer.write_data(0, data(&layer)).expect_err("aborted")),
            QemuNbdError::Aborted
        ));
        assert!(matches!(&*layer.read_phase(), Phase::Idle));
        layer.finish().expect_err("aborted");
    }
}

/// A small file system in memory, unmounted on drop.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let directory = directory();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=3M", "none"]).arg(directory.path());
        if mount.output().is_ok_and(|output| output.status.success()) {
            return Some(Self(directory));
        }
        skip("cannot mount a tmpfs: not root?");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: nothing may keep the directory from being removed.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_told_and_never_a_success() {
    for tools in qemus() {
        for compression in [Compression::None, Compression::Zlib] {
            let Some(disk) = SmallDisk::mount() else { return };
            let spec = LayerSpec { compression, ..spec(disk.0.path(), "layer", 16 << 20) };
            let layer = QemuNbdLayer::create(&spec, options(&tools)).expect("created");
            let mut random = Random::new(5);
            let write = |n: u64| layer.write_data(n << 16, Bytes::from(random.bytes(1 << 16)));
            let result = (0..256).try_for_each(write).and_then(|()| layer.finish());
            let error = told(&result.expect_err("16 MiB do not fit"));
            assert!(error.contains("No space left on device"), "{error}");
            layer.finish().expect_err("not all was written");
            drop(layer);
            fs::remove_file(&spec.path).expect("removable");
        }
    }
}
