//! The NBD protocol, as far as a client that writes a disk image needs it.
