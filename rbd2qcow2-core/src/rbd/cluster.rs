//! Connections: a cluster, and a pool in it.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use rados_sys::{rados_ioctx_t, rados_t};
use rbd2qcow2_sys as sys;
use rustix::io::Errno;

use super::error::{RbdError, check};
use super::patience::{Patience, teardown};
use crate::files;

/// How to reach a cluster: what the `rbd` program takes on its command line.
///
/// What is not given is found as librados finds it: the environment (`CEPH_CONF`, `CEPH_ARGS`), then
/// `/etc/ceph/ceph.conf`, `~/.ceph/config` and `ceph.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

impl ClusterOptions {
    /// The client's full name: as given, else by `CEPH_ARGS`, else the administrator's.
    fn client(&self) -> String {
        let from_env = || client_in(&std::env::var("CEPH_ARGS").unwrap_or_default());
        self.name.clone().or_else(from_env).unwrap_or_else(|| "client.admin".to_owned())
    }
}

/// The client that `CEPH_ARGS` names. librados takes every other option from there, but wants the
/// name before it reads any; the `rbd` program knows these.
pub(super) fn client_in(arguments: &str) -> Option<String> {
    let mut words = arguments.split_whitespace();
    let mut client = None;
    while let Some(word) = words.next() {
        let (option, value) = match word.split_once('=') {
            Some((option, value)) => (option, Some(value)),
            None => (word, None),
        };
        let prefix = match option {
            "--id" | "--user" | "-i" => "client.",
            "--name" | "-n" => "",
            _ => continue,
        };
        client = value.or_else(|| words.next()).map(|name| format!("{prefix}{name}"));
    }
    client
}

/// Monitors that are up answer in milliseconds; librados's own limit of 300 s is a hang to a person.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Descriptors that must be left: 14 are taken by a connection to a monitor and two OSDs, and one more by each
/// OSD. librados aborts the process where it lacks those for its threads, and tries to connect for ever where it
/// lacks others.
const FILES: usize = 32;

/// librbd's default of 10 makes the per-object pass of a diff wait for round trips: 15,000 objects/s
/// against 33,000 with 128.
const CONCURRENT_MANAGEMENT_OPS: &CStr = c"128";

/// A handle on its way to the thread that closes it.
struct Sendable(rados_t);

// SAFETY: librados.h: a cluster handle is not bound to a thread.
unsafe impl Send for Sendable {}

/// A connection to a cluster. Clones share it; the last one closes it.
#[derive(Clone, Debug)]
pub struct Cluster {
    handle: Arc<ClusterHandle>,
    patience: Patience,
}

#[derive(Debug)]
struct ClusterHandle {
    raw: rados_t,
}

// SAFETY: librados.h: a cluster handle may be used by several threads at once.
unsafe impl Send for ClusterHandle {}
// SAFETY: as above.
unsafe impl Sync for ClusterHandle {}

impl Drop for ClusterHandle {
    fn drop(&mut self) {
        let raw = Sendable(self.raw);
        teardown("disconnect from the cluster", move || {
            let Sendable(raw) = { raw };
            // SAFETY: `raw` came from rados_create2, and every Pool keeps this handle alive.
            unsafe { rados_sys::rados_shutdown(raw) };
        });
    }
}

impl Cluster {
    /// Connects. Blocks until the monitors answered, for 30 s at most.
    ///
    /// # Errors
    /// [`RbdError::Failed`] for a configuration that cannot be read, monitors that do not answer, a
    /// key that is refused; [`RbdError::NoKeyring`], [`RbdError::NoMonitors`], [`RbdError::NoAnswer`],
    /// [`RbdError::TooManyFiles`] and [`RbdError::Cancelled`].
    pub fn connect(options: &ClusterOptions, patience: Patience) -> Result<Self, RbdError> {
        let client = options.client();
        let what = || match &options.mon_host {
            Some(hosts) => format!("connect to the cluster at {hosts} as {client}"),
            None => format!("connect to the cluster as {client}"),
        };
        files::expect(FILES).map_err(|cause| RbdError::TooManyFiles { what: what(), cause })?;
        let cluster = Self::configure(options, patience.clone())?;
        let limit = CONNECT_LIMIT.min(patience.limit);
        cluster.set(c"client_mount_timeout", &limit.as_secs().max(1).to_string())?;
        let handle = cluster.clone();
        // Twice the limit: librados itself should notice first and say more.
        let wait = Patience { limit: limit * 2, cancel: patience.cancel };
        // SAFETY: the handle is configured and not yet connected; the closure keeps it alive.
        let code = wait.call(what, move || unsafe { rados_sys::rados_connect(handle.handle.raw) })?;
        if code == -Errno::NOENT.raw_os_error() {
            return Err(cluster.what_is_missing(&client)?);
        }
        check(code, what)?;
        Ok(cluster)
    }

    /// Which of the two things that a connection needs was not found: librados says only that
    /// something was not.
    fn what_is_missing(&self, client: &str) -> Result<RbdError, RbdError> {
        if self.get(c"mon_host")?.trim().is_empty() {
            return Ok(RbdError::NoMonitors);
        }
        Ok(RbdError::NoKeyring { client: client.to_owned(), searched: self.get(c"keyring")? })
    }

    /// A handle that knows its configuration and is not connected.
    fn configure(options: &ClusterOptions, patience: Patience) -> Result<Self, RbdError> {
        let what = || "set up librados".to_owned();
        let client = options.client();
        let name = c_string(&client, || format!("connect as {client:?}"))?;
        let mut raw: rados_t = ptr::null_mut();
        // SAFETY: both strings are NUL-terminated and live through the call.
        let code = unsafe { rados_sys::rados_create2(&mut raw, c"ceph".as_ptr(), name.as_ptr(), 0) };
        check(code, what)?;
        let cluster = Self { handle: Arc::new(ClusterHandle { raw }), patience };

        let conf = options.conf.as_ref().map(|path| path.display().to_string());
        let path = conf.as_deref().map(|path| c_string(path, what)).transpose()?;
        // SAFETY: null stands for librados's own search path.
        let code = unsafe {
            rados_sys::rados_conf_read_file(raw, path.as_ref().map_or(ptr::null(), |path| path.as_ptr()))
        };
        // Without a file of that name given, everything may come from elsewhere.
        let elsewhere = options.mon_host.is_some() || std::env::var_os("CEPH_ARGS").is_some();
        if conf.is_some() || !elsewhere {
            check(code, || match &conf {
                Some(path) => format!("read the configuration file {path}"),
                None => "find a Ceph configuration file (CEPH_CONF, /etc/ceph/ceph.conf)".to_owned(),
            })?;
        }
        // SAFETY: null stands for CEPH_ARGS.
        let code = unsafe { rados_sys::rados_conf_parse_env(raw, ptr::null()) };
        check(code, || "understand the environment variable CEPH_ARGS".to_owned())?;

        if let Some(keyring) = &options.keyring {
            cluster.set(c"keyring", &keyring.display().to_string())?;
        }
        if let Some(hosts) = &options.mon_host {
            cluster.set(c"mon_host", hosts)?;
        }
        cluster.set(c"rbd_concurrent_management_ops", &CONCURRENT_MANAGEMENT_OPS.to_string_lossy())?;
        // Everything is read once: a cache only costs a copy.
        cluster.set(c"rbd_cache", "false")?;
        if sys::newer::rbd_aio_write_zeroes().is_some() {
            // What is written stays as it is until librbd is done with it; and those librbds (Pacific and
            // later) are done only when nothing refers to it any more.
            cluster.set(c"rbd_disable_zero_copy_writes", "false")?;
        }
        Ok(cluster)
    }

    fn set(&self, option: &CStr, value: &str) -> Result<(), RbdError> {
        let what = || format!("set {} to {value:?}", option.to_string_lossy());
        let value = c_string(value, what)?;
        // SAFETY: the handle lives as long as self, the strings through the call.
        let code = unsafe { rados_sys::rados_conf_set(self.handle.raw, option.as_ptr(), value.as_ptr()) };
        check(code, what).map(drop)
    }

    fn get(&self, option: &CStr) -> Result<String, RbdError> {
        let what = || format!("look up {}", option.to_string_lossy());
        string_of(what, |buffer, length| {
            // SAFETY: the handle lives as long as self, the buffer has `length` bytes.
            let code = unsafe { rados_sys::rados_conf_get(self.handle.raw, option.as_ptr(), buffer, length) };
            // Other than the rest of librados, this does not say -ERANGE.
            if code == -Errno::NAMETOOLONG.raw_os_error() { -Errno::RANGE.raw_os_error() } else { code }
        })
    }

    /// The cluster's id, as `ceph fsid` prints it.
    ///
    /// # Errors
    /// [`RbdError::Failed`].
    pub fn fsid(&self) -> Result<String, RbdError> {
        let what = || "ask for the cluster's fsid".to_owned();
        string_of(what, |buffer, length| {
            // SAFETY: the buffer has `length` bytes.
            unsafe { rados_sys::rados_cluster_fsid(self.handle.raw, buffer, length) }
        })
    }

    /// The number that the cluster knows this connection by.
    #[must_use]
    pub fn instance_id(&self) -> u64 {
        // SAFETY: the handle is connected, as all that is given out.
        unsafe { rados_sys::rados_get_instance_id(self.handle.raw) }
    }

    /// Opens a pool; `namespace` is empty for the default one.
    ///
    /// # Errors
    /// [`RbdError::Failed`] when there is no such pool or namespace, [`RbdError::TooOld`] for a
    /// namespace on a librbd before Nautilus, [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn pool(&self, name: &str, namespace: &str) -> Result<Pool, RbdError> {
        let what = || format!("open pool {name:?}");
        let pool_name = c_string(name, what)?;
        let (cluster, pool, inside) = (self.clone(), name.to_owned(), namespace.to_owned());
        let handle = self.patience.call(what, move || {
            let mut raw: rados_ioctx_t = ptr::null_mut();
            // SAFETY: the cluster is connected, the name lives through the call.
            let code =
                unsafe { rados_sys::rados_ioctx_create(cluster.handle.raw, pool_name.as_ptr(), &mut raw) };
            (code >= 0).then(|| PoolHandle { raw, cluster, name: pool, namespace: inside }).ok_or(code)
        })?;
        let handle = handle.map_err(|code| RbdError::failed(what(), code))?;
        let pool = Pool { handle: Arc::new(handle), patience: self.patience.clone() };
        if !namespace.is_empty() {
            pool.enter_namespace(name, namespace)?;
        }
        Ok(pool)
    }
}

/// An open pool, in one of its namespaces. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Pool {
    handle: Arc<PoolHandle>,
    patience: Patience,
}

#[derive(Debug)]
struct PoolHandle {
    raw: rados_ioctx_t,
    /// Shut down only after this I/O context is destroyed.
    cluster: Cluster,
    name: String,
    namespace: String,
}

// SAFETY: librados.h: an I/O context may be used by several threads as long as none changes its
// namespace or locator key; that happens only in Cluster::pool, before it is shared.
unsafe impl Send for PoolHandle {}
// SAFETY: as above.
unsafe impl Sync for PoolHandle {}

impl Drop for PoolHandle {
    fn drop(&mut self) {
        // SAFETY: `raw` came from rados_ioctx_create, and every Image keeps this handle alive.
        unsafe { rados_sys::rados_ioctx_destroy(self.raw) };
    }
}

impl Pool {
    pub(super) fn raw(&self) -> rados_ioctx_t {
        self.handle.raw
    }

    /// The same pool with another patience, for it and the images that it opens.
    #[must_use]
    pub fn with_patience(&self, patience: Patience) -> Self {
        Self { handle: self.handle.clone(), patience }
    }

    /// How long calls on this pool may take.
    #[must_use]
    pub fn patience(&self) -> &Patience {
        &self.patience
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.handle.name
    }

    /// The namespace; empty for the default one.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.handle.namespace
    }

    /// `POOL/IMAGE` or `POOL/NAMESPACE/IMAGE`, as the `rbd` program takes it.
    #[must_use]
    pub fn spec(&self, image: &str) -> String {
        match self.namespace() {
            "" => format!("{}/{image}", self.name()),
            namespace => format!("{}/{namespace}/{image}", self.name()),
        }
    }

    /// The cluster that the pool is in.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.handle.cluster
    }

    fn enter_namespace(&self, pool: &str, namespace: &str) -> Result<(), RbdError> {
        let what = || format!("open namespace {namespace:?} of pool {pool:?}");
        let name = c_string(namespace, what)?;
        let look_up = sys::newer::rbd_namespace_exists()
            .ok_or_else(|| RbdError::TooOld { what: what(), since: "Nautilus (14.2)" })?;
        let (handle, asked) = (self.clone(), name.clone());
        let (code, exists) = self.patience().call(what, move || {
            let mut exists = false;
            // SAFETY: the I/O context is open, the name lives through the call.
            let code = unsafe { look_up(handle.raw(), asked.as_ptr(), &mut exists) };
            (code, exists)
        })?;
        check(code, what)?;
        if !exists {
            return Err(RbdError::Failed { what: what(), errno: Errno::NOENT });
        }
        // SAFETY: nobody else has the I/O context yet; the name lives through the call.
        unsafe { rados_sys::rados_ioctx_set_namespace(self.raw(), name.as_ptr()) };
        Ok(())
    }

    /// The names of the pool's images, sorted. Bytes that are not UTF-8 are replaced: such an image
    /// cannot be opened by this name, and fails alone.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn images(&self) -> Result<Vec<String>, RbdError> {
        let what = || "list the pool's images".to_owned();
        let pool = self.clone();
        let names = self.patience().call(what, move || {
            bytes_of(what, |buffer, length| {
                // SAFETY: the buffer has `length` bytes.
                let code = unsafe { sys::rbd_list(pool.raw(), buffer, length) };
                if let Ok(used) = usize::try_from(code) {
                    // The length is that of the list only when it does not fit.
                    *length = used;
                }
                code
            })
        })??;
        let mut names: Vec<_> =
            split_nul(&names).map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        names.sort();
        Ok(names)
    }
}

/// `text` as C takes it.
pub(super) fn c_string(text: &str, what: impl FnOnce() -> String) -> Result<CString, RbdError> {
    CString::new(text).map_err(|_| RbdError::NulByte { what: what() })
}

pub(super) fn utf8(bytes: &[u8], what: impl FnOnce() -> String) -> Result<String, RbdError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| RbdError::NotUtf8 { what: what() })
}

/// The strings of a buffer in which each is followed by a NUL byte.
pub(super) fn split_nul(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.strip_suffix(&[0]).into_iter().flat_map(|strings| strings.split(|byte| *byte == 0))
}

/// Calls `fill` with a larger buffer until it fits (-ERANGE says that it does not). The bytes that
/// `fill` says it filled.
pub(super) fn bytes_of(
    what: impl FnOnce() -> String,
    mut fill: impl FnMut(*mut c_char, &mut usize) -> i32,
) -> Result<Vec<u8>, RbdError> {
    let mut buffer = vec![0_u8; 4096];
    loop {
        let mut length = buffer.len();
        let code = fill(buffer.as_mut_ptr().cast(), &mut length);
        if code == -Errno::RANGE.raw_os_error() {
            // The list may grow between two calls.
            buffer.resize(length.max(buffer.len() * 2), 0);
            continue;
        }
        check(code, what)?;
        buffer.truncate(length);
        return Ok(buffer);
    }
}

/// Calls `fill` with a larger buffer until the NUL-terminated string fits.
pub(super) fn string_of(
    what: impl Fn() -> String,
    mut fill: impl FnMut(*mut c_char, usize) -> i32,
) -> Result<String, RbdError> {
    let mut buffer = vec![0_u8; 256];
    loop {
        let code = fill(buffer.as_mut_ptr().cast(), buffer.len());
        if code == -Errno::RANGE.raw_os_error() && buffer.len() < 1 << 20 {
            buffer.resize(buffer.len() * 2, 0);
            continue;
        }
        check(code, &what)?;
        let text = CStr::from_bytes_until_nul(&buffer).map_err(|_| RbdError::NotUtf8 { what: what() })?;
        return utf8(text.to_bytes(), what);
    }
}
