//! The command line of `serve`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::Args;
use rbd2qcow2_core::serve::{Access, Listen, Serve, ServeOptions};

use super::values::PointSpec;

pub(super) const EXAMPLES: &str = "\
Examples:
  rbd2qcow2 serve /backups vm-1                            on a socket with a name of its own
  rbd2qcow2 serve /backups vm-1@20261122T173312Z --socket /run/vm-1.sock
  rbd2qcow2 serve /backups vm-1 --writable --overlay-dir /var/tmp
  rbd2qcow2 serve /backups vm-1 --port 10809

Prints the URI of the NBD export on standard output as soon as it can be used, and serves it until
SIGINT, SIGTERM or SIGHUP; the exit status is 130 then. With it:
  qemu-system-x86_64 -m 2G -snapshot -drive 'file=URI,format=raw,if=virtio'
  qemu-nbd -r -f raw -c /dev/nbd0 'URI' && mount -o ro /dev/nbd0p1 /mnt
  qemu-img convert -f raw -O raw 'URI' vm-1.raw

Needs qemu-nbd 5.2 or later, and no cluster. The points are never written to. Until it ends, no
backup of the image can run, and nothing of it is pruned.";

/// The arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// The image, and the point as `list` shows it; the newest when none is named
    #[arg(value_name = "IMAGE[@POINT]")]
    point: PointSpec,
    /// Unix socket to serve on, which only its owner can use. Nothing may be at this path, but for a
    /// socket that a killed run has left [default: one in XDG_RUNTIME_DIR, or in the directory for
    /// temporary files, whose name tells image and point]
    #[arg(long, value_name = "PATH", conflicts_with = "port")]
    socket: Option<PathBuf>,
    /// TCP port to serve on, instead of a socket; 0 for any that is free. All users of the machine can
    /// reach it: NBD asks for no password
    #[arg(long, value_name = "N")]
    port: Option<u16>,
    /// IP address that the port belongs to. On any but the loopback address the network can reach the
    /// disk, without a password, and all that is read travels unencrypted
    #[arg(long, value_name = "ADDRESS", requires = "port", default_value_t = Ipv4Addr::LOCALHOST.into())]
    address: IpAddr,
    /// Let clients write, to an overlay that is thrown away in the end. Without space for it, they get
    /// I/O errors
    #[arg(long)]
    writable: bool,
    /// Existing directory for the overlay, which grows with what is written. It has no name; NFS shows
    /// it as .nfsXXXX until the end [default: the one for temporary files]
    #[arg(long, value_name = "DIR", requires = "writable")]
    overlay_dir: Option<PathBuf>,
    /// Connections at once; more of them wait
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
    /// The program `qemu-nbd`
    #[arg(long, value_name = "PATH", default_value = "qemu-nbd", env = "RBD2QCOW2_QEMU_NBD")]
    qemu_nbd: PathBuf,
}

impl ServeArgs {
    /// The server that these arguments ask for.
    pub fn to_serve(&self) -> Serve {
        let mut options = ServeOptions::default();
        options.listen = match (&self.socket, self.port) {
            (_, Some(port)) => Listen::Tcp(SocketAddr::new(self.address, port)),
            (Some(path), None) => Listen::Socket(path.clone()),
            (None, None) => Listen::AnySocket,
        };
        if self.writable {
            options.access = Access::Writable { overlay_directory: self.overlay_dir.clone() };
        }
        options.connections = self.connections.into();
        options.qemu_nbd.clone_from(&self.qemu_nbd);
        Serve { dest: self.dest.clone(), image: self.point.image.clone(), point: self.point.point, options }
    }
}
