//! Benchmarks of rbd2qcow2-core: see `benches/`. This library is empty.
