//! Points restored to images, a test for each kind of image, of target and of mishap.

mod damage;
mod overwrite;
mod properties;
mod refusals;

use crate::cluster::unique_image;
use crate::driver::{FULL_FEATURES, Layout, Spec};
use crate::store::{Made, Store};

/// One mebibyte.
const MIB: u64 = 1 << 20;

/// Bytes of an object in most of these images.
const OBJECT: u64 = 64 << 10;

fn small_objects() -> Layout {
    Layout::new(16, FULL_FEATURES)
}

/// A small image with some data, nobody's, and a point of it.
fn image_with_point(store: &mut Store, name: &str) -> (Spec, Made) {
    let spec = store.image(name, 2 * MIB, &small_objects());
    store.driver.write(&spec, 100_000, 1_000_000, 1).expect("a write");
    let made = store.back_up(&spec);
    store.driver.close(&spec).expect("closed");
    (spec, made)
}

/// Whether there is no image of the name.
fn is_absent(store: &Store, spec: &Spec) -> bool {
    !store.driver.images(&spec.pool, &spec.namespace).expect("images").contains(&spec.image)
}

/// A name of an image that is not there.
fn elsewhere() -> Spec {
    unique_image("restored")
}
