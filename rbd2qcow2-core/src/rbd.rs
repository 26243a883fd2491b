//! Safe handles over librados and librbd. The only room with unsafe code.
#![allow(unsafe_code)]

use std::path::PathBuf;

/// How to reach a cluster: what the `rbd` program takes on its command line.
///
/// What is not given is found as librados finds it: the environment (`CEPH_CONF`, `CEPH_ARGS`), then
/// `/etc/ceph/ceph.conf`, `~/.ceph/config` and `ceph.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClusterOptions {
    /// The configuration file.
    pub conf: Option<PathBuf>,
    /// The client's full name, `client.admin` for instance.
    pub name: Option<String>,
    /// The client's keyring.
    pub keyring: Option<PathBuf>,
    /// The monitors' addresses.
    pub mon_host: Option<String>,
}

/// Why librados or librbd could not do something.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct RbdError;
