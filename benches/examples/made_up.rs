//! Backs up an image that is made up, of any size, and tells what that took: memory above all.
//!
//! ```text
//! cargo run --release -p rbd2qcow2-benches --example made_up -- FILE TEBIBYTES none|zlib|zstd[:LEVEL]
//! ```
//!
//! In each 256 MiB a cluster has changed, two small places, and a range to zeroes.

use std::error::Error;
use std::io::{Write, stdout};
use std::path::Path;
use std::time::Instant;

use rbd2qcow2_benches::layer_spec;
use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::copy::Copy;
use rbd2qcow2_core::extent::{Extent, ExtentKind};
use rbd2qcow2_core::layer::native::{Compressors, NativeLayer};
use rbd2qcow2_core::layer::{Compression, LayerSpec, LayerWriter};
use rbd2qcow2_core::options::BackupOptions;
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::pattern::PatternSource;

const KIB: u64 = 1 << 10;

fn changes() -> Vec<Extent> {
    let data = |offset, length| Extent { offset, length, kind: ExtentKind::Data };
    vec![
        data(0, 128 * KIB),
        data(1000 * KIB, 4 * KIB),
        Extent { offset: 4096 * KIB, length: 8000 * KIB, kind: ExtentKind::Zero },
        data(33_333 * KIB, 4 * KIB),
    ]
}

fn compression(text: &str) -> Result<Compression, Box<dyn Error>> {
    Ok(match text.split_once(':') {
        Some(("zstd", level)) => Compression::Zstd { level: Some(level.parse()?) },
        None if text == "zstd" => Compression::Zstd { level: None },
        None if text == "zlib" => Compression::Zlib,
        None if text == "none" => Compression::None,
        _ => return Err(format!("{text} is no compression").into()),
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, tebibytes, how] = &arguments[..] else {
        return Err("FILE TEBIBYTES COMPRESSION are wanted".into());
    };
    let size = tebibytes.parse::<u64>()? << 40;
    let root = layer_spec(Path::new(path), size, compression(how)?);
    let spec = LayerSpec { backing: Some("base.qcow2".into()), ..root };
    let begun = Instant::now();
    let options = BackupOptions::default();
    let (cancel, progress) = (Cancel::new(), Progress::default());
    let layer = NativeLayer::create(&spec, Compressors::default())?;
    let copy = Copy {
        source: &PatternSource::new(size, 256 << 20, changes(), 4),
        layer: &layer,
        root: false,
        digests: None,
        buffers: &BufferPool::new(options.memory),
        rate_limit: None,
        parallel: options.parallel,
        progress: &progress,
        cancel: &cancel,
        stop: &cancel.part(),
    };
    copy.run()?;
    layer.finish()?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    let [data, zero] = [&progress.data, &progress.zero].map(|counter| counter.get() >> 20);
    let file = std::fs::metadata(&spec.path)?.len() >> 20;
    let time = begun.elapsed().as_secs_f64();
    writeln!(stdout(), "{data} MiB of data, {zero} MiB of zeroes, file of {file} MiB, {time:.1} s, {peak}")?;
    Ok(())
}
