//! A layer written through qemu-nbd.
