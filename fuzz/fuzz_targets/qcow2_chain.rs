//! A chain of two or three layers, which may have different sizes and geometries, read by the library
//! and by a naive reader.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::qcow2::chain::ChainReader;
use rbd2qcow2_fuzz::compare;
use rbd2qcow2_fuzz::image::{Image, Input, build};

fuzz_target!(|bytes: &[u8]| {
    let images = if bytes.first() == Some(&0) { files(&bytes[1..]) } else { built(bytes) };
    let (mut readers, mut models) = (Vec::new(), Vec::new());
    let mut name = "top".to_owned();
    for image in images {
        let Some((reader, model)) = compare::open(Path::new(&name), image) else {
            return;
        };
        if let Ok(Some(below)) = reader.header().chain_backing() {
            below.clone_into(&mut name);
        }
        readers.push(reader);
        models.push(model);
    }
    let Ok(chain) = ChainReader::from_layers(readers) else {
        return;
    };
    let probe = bytes.last_chunk().map_or(0, |last| u64::from_be_bytes(*last));
    compare::chain(&chain, models, &[probe, probe >> 40]);
});

/// Two files: the length of the first, four bytes, and the files.
fn files(bytes: &[u8]) -> Vec<Image> {
    let mut input = Input(bytes);
    let length = usize::try_from(input.take::<4>()).unwrap_or(usize::MAX);
    let (top, bottom) = input.0.split_at(length.min(input.0.len()));
    vec![Image::whole(top), Image::whole(bottom)]
}

/// Two or three, each after the length of what tells how to build it.
fn built(bytes: &[u8]) -> Vec<Image> {
    let mut input = Input(bytes);
    let below: &[_] = match input.byte() % 2 {
        0 => &[Some("second"), None],
        _ => &[Some("second"), Some("third"), None],
    };
    let mut images = Vec::new();
    for name in below {
        let length = usize::from(input.byte()).min(input.0.len());
        let (own, rest) = input.0.split_at(if name.is_some() { length } else { input.0.len() });
        images.push(build(&mut Input(own), *name));
        input = Input(rest);
    }
    images
}
