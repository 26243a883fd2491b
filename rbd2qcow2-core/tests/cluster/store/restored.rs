//! Points that are restored to files and to images by the library.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::PointName;
use rbd2qcow2_core::progress::Observer;
use rbd2qcow2_core::rbd::ClusterOptions;
use rbd2qcow2_core::restore::image::{ImageTarget, Overrides};
use rbd2qcow2_core::restore::{FileFormat, Restore, RestoreError, RestoreOptions, RestoreReport};
use tempfile::TempDir;

use super::{Made, Store, compare};
use crate::cluster::unique_image;
use crate::driver::Spec;

/// More than any answer of a cluster takes, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A point comes back as it was, to the byte.
pub fn check(dest: &Path, made: &Made) {
    let directory = TempDir::new_in(made.truth.parent().expect("a directory")).expect("a directory");
    let raw = directory.path().join("raw");
    let report = restore(dest, made).to_file(&raw, &FileFormat::Raw, &(), &Cancel::new()).expect("restored");
    let size = made.size();
    // Without a manifest nobody knows the exact size.
    let known = made.file.with_extension("json").exists();
    assert_eq!(report.virtual_size, if known { size } else { size.next_multiple_of(512) }, "{made:?}");
    let file = File::options().write(true).open(&raw).expect("it was restored");
    assert_eq!(file.metadata().expect("a length").len(), report.virtual_size, "{made:?}");
    file.set_len(size.next_multiple_of(512)).expect("padded");
    compare(&made.truth, &raw, made);
}

fn restore(dest: &Path, made: &Made) -> Restore {
    Restore {
        dest: dest.to_owned(),
        image: made.spec.image.clone(),
        point: Some(PointName::parse(&made.point).expect("a point")),
        options: RestoreOptions::default(),
    }
}

impl Made {
    /// The size that its image had, in bytes.
    pub fn size(&self) -> u64 {
        fs::metadata(&self.truth).expect("the truth").len()
    }
}

impl Store {
    /// An image to restore to: one that exists is refused, and nothing is overridden.
    pub fn target(&self, spec: &Spec) -> ImageTarget {
        ImageTarget {
            cluster: ClusterOptions { conf: Some(self.cluster.conf.clone()), ..ClusterOptions::default() },
            pool: spec.pool.clone(),
            namespace: spec.namespace.clone(),
            image: spec.image.clone(),
            overwrite: false,
            overrides: Overrides::default(),
            patience: PATIENCE,
        }
    }

    /// The same for an image that exists.
    pub fn overwriting(&self, spec: &Spec) -> ImageTarget {
        ImageTarget { overwrite: true, ..self.target(spec) }
    }

    /// Restores a point to an image, and checks nothing.
    pub fn restore(&self, made: &Made, target: &ImageTarget) -> Result<RestoreReport, RestoreError> {
        self.restore_observed(made, target, &())
    }

    /// The same, and tells how it goes.
    pub fn restore_observed(
        &self,
        made: &Made,
        target: &ImageTarget,
        observer: &dyn Observer,
    ) -> Result<RestoreReport, RestoreError> {
        restore(self.dest(), made).to_image(target, observer, &Cancel::new())
    }

    /// Restores a point to an image, which must then hold it, and zeroes to its end.
    ///
    /// # Panics
    /// Where it does not.
    pub fn restore_to(&self, made: &Made, target: &ImageTarget) -> RestoreReport {
        let report = self.restore(made, target).unwrap_or_else(|error| panic!("{made:?}: {}", told(&error)));
        let spec = Spec::in_namespace(&target.pool, &target.namespace, &target.image);
        self.assert_image(made, &spec);
        assert!(self.driver.watchers(&spec).expect("watchers").is_empty(), "{spec:?} is still open");
        report
    }

    /// Whether an image holds a point, and zeroes to its end, and is not marked as incomplete.
    pub fn assert_image(&self, made: &Made, spec: &Spec) {
        assert_eq!(
            self.driver.metadata_get(spec, "rbd2qcow2-incomplete").expect("metadata"),
            None,
            "{spec:?}"
        );
        let raw = tempfile::NamedTempFile::new_in(self.truths.path()).expect("a temporary file");
        self.driver.read_to(spec, None, raw.path()).expect("the image can be read");
        let (size, file) = (made.size(), raw.as_file());
        let length = file.metadata().expect("a length").len();
        assert!(length >= size, "{spec:?} has {length} bytes: {made:?}");
        let mut behind = vec![0; usize::try_from(length - size).expect("small")];
        file.read_exact_at(&mut behind, size).expect("the end");
        assert!(behind.iter().all(|byte| *byte == 0), "{spec:?} is not zeroes behind {size}: {made:?}");
        file.set_len(size).and_then(|()| file.set_len(size.next_multiple_of(512))).expect("padded");
        compare(&made.truth, raw.path(), made);
    }

    /// Restores every point to an image: to a new one, or to the one that the point before it, which may
    /// be of another image, has just been restored to.
    pub fn check_images(&self) {
        let images =
            self.points.iter().map(|made| &made.spec.image).collect::<std::collections::BTreeSet<_>>();
        let mut last: Option<Spec> = None;
        for (index, made) in self.points.iter().enumerate() {
            // Each image's points are restored in both ways.
            let overwrite = !(index + index / images.len()).is_multiple_of(2);
            if let Some(spec) = last.as_ref().filter(|_| overwrite) {
                let is = self.driver.info(spec, None).expect("there is an image");
                let mut target = self.overwriting(spec);
                target.overrides.size = (is.size < made.size()).then(|| made.size());
                self.restore_to(made, &target);
                let now = self.driver.info(spec, None).expect("there is an image");
                assert_eq!(now.size, is.size.max(made.size()), "{made:?}");
            } else {
                last.iter().for_each(|spec| self.purge(spec));
                let spec = unique_image("restored");
                self.restore_to(made, &self.target(&spec));
                let info = self.driver.info(&spec, None).expect("there is an image");
                assert_eq!(info.size, made.size(), "{made:?}");
                last = Some(spec);
            }
        }
        last.iter().for_each(|spec| self.purge(spec));
    }
}

/// An error with what caused it.
pub fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text += &format!(": {error}");
        next = error.source();
    }
    text
}
