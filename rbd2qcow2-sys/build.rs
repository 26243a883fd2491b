//! Generates the bindings to librbd from the system's headers.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rustc-link-lib=rbd");
    println!("cargo::rerun-if-changed=wrapper.h");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    bindgen::Builder::default()
        .header("wrapper.h")
        .allowlist_function("rbd_.*")
        .allowlist_type("rbd_.*")
        .allowlist_var("(LIB)?RBD_.*")
        // librados's types and functions are rados-sys's, so that handles of the two fit together.
        .blocklist_item("rados_.*")
        .raw_line("use rados_sys::*;")
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .generate()
        .unwrap_or_else(|error| {
            panic!("cannot read rbd/librbd.h: {error}\ninstall librbd's headers and libclang (Debian: librbd-dev librados-dev libclang-dev)")
        })
        .write_to_file(&out)
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", out.display()));
}
