//! The report for programs: JSON Lines on standard output.
//!
//! The keys and their order are a contract with other programs. `null` stands for what is unknown.

use std::io::{self, Write};
use std::path::Path;

use rbd2qcow2_core::chain::PointKind;
use rbd2qcow2_core::error::Causes;
use rbd2qcow2_core::progress::{ImageReport, Status};
use rbd2qcow2_core::restore::RestoreReport;
use rbd2qcow2_core::serve::Served;
use serde::Serialize;

/// Writes one object a line, each as soon as it is known.
#[derive(Debug)]
pub struct JsonLines<W>(W);

impl<W: Write> JsonLines<W> {
    /// Writes to `output`.
    pub fn new(output: W) -> Self {
        Self(output)
    }

    /// Writes an object and flushes it.
    ///
    /// # Errors
    /// What writing met. Part of the line may have been written.
    pub fn write(&mut self, object: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(object)?;
        line.push(b'\n');
        self.0.write_all(&line)?;
        self.0.flush()
    }
}

/// One image of a backup.
#[derive(Debug, Serialize)]
pub struct BackupLine<'a> {
    /// The image's name.
    image: &'a str,
    /// The new point.
    point: Option<&'a str>,
    /// `full` or `incremental`.
    kind: Option<&'static str>,
    /// `ok`, `skipped` or `failed`.
    status: &'static str,
    /// Why it was skipped or is full.
    reason: Option<&'a str>,
    /// Why it failed: all causes, joined by `: `.
    error: Option<String>,
    /// The new layer.
    file: Option<String>,
    /// Bytes that the layer holds as data; in a dry run the estimate.
    data_bytes: Option<u64>,
    /// Bytes that the layer marks as zeroes.
    zero_bytes: Option<u64>,
    /// Bytes read from the cluster.
    read_bytes: Option<u64>,
    /// Bytes that the layer occupies on disk.
    layer_bytes: Option<u64>,
    /// Time until nothing was left to compare.
    diff_seconds: Option<f64>,
    /// Time that the image took.
    seconds: f64,
    /// Bytes that were found unchanged, as they were reported to be.
    proved_bytes: Option<u64>,
    /// What the point may lack, and nobody can find out.
    not_excluded: Option<&'a str>,
}

impl<'a> BackupLine<'a> {
    /// The line of a report. Numbers about a layer are known only where one was made, and a dry run
    /// makes none: it knows an estimate of the data.
    pub fn new(report: &'a ImageReport, dry_run: bool) -> Self {
        let ok = report.status == Status::Ok;
        let made = |number| (ok && !dry_run).then_some(number);
        Self {
            image: &report.image,
            point: report.point.as_deref(),
            kind: report.kind.map(PointKind::as_str),
            status: report.status.as_str(),
            reason: report.reason.as_deref(),
            error: report.error.as_deref().map(|error| Causes(error).to_string()),
            file: report.file.as_deref().map(path),
            data_bytes: ok.then_some(report.data_bytes),
            zero_bytes: made(report.zero_bytes),
            read_bytes: made(report.read_bytes),
            layer_bytes: made(report.layer_bytes),
            diff_seconds: (ok && !dry_run).then_some(report.diff_time.as_secs_f64()),
            seconds: report.time.as_secs_f64(),
            proved_bytes: made(report.proved_bytes),
            not_excluded: report.not_excluded.as_deref().filter(|_| ok),
        }
    }
}

/// A point that was restored.
#[derive(Debug, Serialize)]
pub struct RestoreLine<'a> {
    /// The image's name.
    image: &'a str,
    /// The point.
    point: String,
    /// The file or the image, as the command line names it.
    target: String,
    /// Bytes of the image that were written.
    bytes_written: u64,
    /// Bytes of the image that are zeroes and were left out: the rest. In an RBD image that existed
    /// those that had to be made zeroes.
    zero_bytes: u64,
    /// Time that it took.
    seconds: f64,
}

impl<'a> RestoreLine<'a> {
    /// The line of a report.
    pub fn new(report: &'a RestoreReport, target: String) -> Self {
        Self {
            image: report.image.as_str(),
            point: report.point.to_string(),
            target,
            bytes_written: report.bytes_written,
            zero_bytes: report.zero_bytes,
            seconds: report.time.as_secs_f64(),
        }
    }
}

/// A point that is served.
#[derive(Debug, Serialize)]
pub struct ServeLine<'a> {
    /// The image's name.
    image: &'a str,
    /// The point.
    point: String,
    /// Where the disk is.
    uri: String,
    /// Whether clients can write.
    writable: bool,
    /// The size of the disk in bytes: the image's, rounded up to 512.
    size: u64,
}

impl<'a> ServeLine<'a> {
    /// The line of a server that has started.
    pub fn new(served: &'a Served) -> Self {
        Self {
            image: served.image().as_str(),
            point: served.point().to_string(),
            uri: served.uri(),
            writable: served.is_writable(),
            size: served.size(),
        }
    }
}

/// A path as text; JSON has no other strings.
fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// What a backup's report becomes.
    fn line(report: &ImageReport, dry_run: bool) -> String {
        let mut lines = JsonLines::new(Vec::new());
        lines.write(&BackupLine::new(report, dry_run)).unwrap();
        String::from_utf8(lines.0).unwrap()
    }

    #[test]
    fn a_success_has_all_keys_in_order() {
        let mut report = ImageReport::new("vm \"1\"", Status::Ok);
        report.point = Some("20261122T173312Z".into());
        report.kind = Some(PointKind::Full);
        report.reason = Some("the base snapshot is gone".into());
        report.file = Some("/b/vm/vm@20261122T173312Z.qcow2".into());
        report.data_bytes = 1;
        report.zero_bytes = 2;
        report.read_bytes = 3;
        report.proved_bytes = 5;
        report.not_excluded = Some("late writes".into());
        report.layer_bytes = 4;
        report.diff_time = Duration::from_millis(500);
        report.time = Duration::from_secs(2);
        assert_eq!(
            line(&report, false),
            concat!(
                r#"{"image":"vm \"1\"","point":"20261122T173312Z","kind":"full","status":"ok","#,
                r#""reason":"the base snapshot is gone","error":null,"#,
                r#""file":"/b/vm/vm@20261122T173312Z.qcow2","data_bytes":1,"zero_bytes":2,"#,
                r#""read_bytes":3,"layer_bytes":4,"diff_seconds":0.5,"seconds":2.0,"proved_bytes":5,"#,
                r#""not_excluded":"late writes"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_failure_tells_all_causes_and_no_numbers() {
        let mut report = ImageReport::new("vm", Status::Failed);
        report.error = Some(Box::new(crate::outcome::CommandError::Output(io::Error::other("full"))));
        assert_eq!(
            line(&report, false),
            concat!(
                r#"{"image":"vm","point":null,"kind":null,"status":"failed","reason":null,"#,
                r#""error":"cannot write to standard output: full","file":null,"data_bytes":null,"#,
                r#""zero_bytes":null,"read_bytes":null,"layer_bytes":null,"diff_seconds":null,"#,
                r#""seconds":0.0,"proved_bytes":null,"not_excluded":null}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_dry_run_knows_only_the_estimate() {
        let mut report = ImageReport::new("vm", Status::Ok);
        report.kind = Some(PointKind::Incremental);
        report.data_bytes = 7;
        let line = line(&report, true);
        assert!(line.contains(r#""kind":"incremental","status":"ok""#), "{line}");
        assert!(line.contains(r#""data_bytes":7,"zero_bytes":null,"read_bytes":null"#), "{line}");
    }
}
