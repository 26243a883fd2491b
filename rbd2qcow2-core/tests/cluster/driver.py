"""A second client of a Ceph cluster, written on python3-rados and python3-rbd, for tests.

Reads one JSON object a line from stdin: {"do": COMMAND, ...arguments}. Answers each with one
line: {"ok": RESULT} or {"error": TEXT, "errno": NUMBER or null}. Ends when stdin ends, so also when
its parent dies. `driver.rs` is the other side and says what each command means.

Images stay open for writing between commands, as a virtual machine holds them, until "close".
"""

import ctypes
import hashlib
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time

import rados
import rbd

# How long an operation under way may still take once the parent is gone.
GRACE = 5
# Read at a time; also the unit in which holes are left in files.
CHUNK = 4 << 20


class Driver:
    def __init__(self, conf):
        self.cluster = rados.Rados(conffile=conf, conf={
            # A write is in the cluster when the answer is sent.
            "rbd_cache": "false",
            # The least there is: by default discards are rounded to 64 KiB, more than many objects.
            "rbd_discard_granularity_bytes": "4096",
            # Clones need no protected snapshot.
            "rbd_default_clone_format": "2",
        })
        self.cluster.connect(timeout=30)
        self.conf = conf
        self.pools = {}
        self.open = {}

    # --- What commands work on

    def pool(self, pool, namespace=""):
        key = (pool, namespace)
        if key not in self.pools:
            ioctx = self.cluster.open_ioctx(pool)
            ioctx.set_namespace(namespace)
            self.pools[key] = ioctx
        return self.pools[key]

    def image(self, spec):
        """The image, open for writing at its head."""
        key = (spec["pool"], spec["namespace"], spec["image"])
        if key not in self.open:
            self.open[key] = rbd.Image(self.pool(*key[:2]), spec["image"])
        return self.open[key]

    def at(self, spec, snapshot):
        """The image, open for reading at a snapshot or (None) at its head; close it."""
        ioctx = self.pool(spec["pool"], spec["namespace"])
        return rbd.Image(ioctx, spec["image"], snapshot=snapshot, read_only=True)

    def shut(self, spec):
        image = self.open.pop((spec["pool"], spec["namespace"], spec["image"]), None)
        if image is not None:
            image.close()

    def shut_all(self):
        while self.open:
            self.open.popitem()[1].close()

    # --- Pools

    def do_fsid(self):
        return self.cluster.get_fsid()

    def do_mon_command(self, command):
        code, out, error = self.cluster.mon_command(json.dumps({"format": "json", **command}), b"")
        if code != 0:
            raise rados.OSError(f"{command.get('prefix')}: {error}", errno=-code)
        return json.loads(out) if out.strip() else None

    def do_pool_create(self, pool, pg_num):
        self.do_mon_command({"prefix": "osd pool create", "pool": pool,
                             "pg_num": pg_num, "pgp_num": pg_num})
        self.cluster.wait_for_latest_osdmap()
        rbd.RBD().pool_init(self.pool(pool), True)

    def do_pool_remove(self, pool):
        for key in [key for key in self.open if key[0] == pool]:
            self.open.pop(key).close()
        for key in [key for key in self.pools if key[0] == pool]:
            self.pools.pop(key).close()
        self.cluster.delete_pool(pool)

    def do_namespace_create(self, pool, namespace):
        rbd.RBD().namespace_create(self.pool(pool), namespace)

    def do_namespace_remove(self, pool, namespace):
        rbd.RBD().namespace_remove(self.pool(pool), namespace)

    def do_images(self, pool, namespace):
        return sorted(rbd.RBD().list(self.pool(pool, namespace)))

    # --- Images

    def do_create(self, spec, size, order, features, stripe_unit, stripe_count):
        rbd.RBD().create(self.pool(spec["pool"], spec["namespace"]), spec["image"], size, order=order,
                         old_format=False, features=feature_bits(features), stripe_unit=stripe_unit,
                         stripe_count=stripe_count)

    def do_clone(self, parent, snapshot, spec, order, features, stripe_unit, stripe_count):
        rbd.RBD().clone(self.pool(parent["pool"], parent["namespace"]), parent["image"], snapshot,
                        self.pool(spec["pool"], spec["namespace"]), spec["image"], order=order,
                        features=feature_bits(features), stripe_unit=stripe_unit,
                        stripe_count=stripe_count)

    def do_remove(self, spec, purge):
        if purge:
            image = self.image(spec)
            for snapshot in list(image.list_snaps()):
                if image.is_protected_snap(snapshot["name"]):
                    image.unprotect_snap(snapshot["name"])
                image.remove_snap(snapshot["name"])
        self.shut(spec)
        rbd.RBD().remove(self.pool(spec["pool"], spec["namespace"]), spec["image"])

    def do_rename(self, spec, name):
        self.shut(spec)
        rbd.RBD().rename(self.pool(spec["pool"], spec["namespace"]), spec["image"], name)

    def do_close(self, spec):
        self.shut(spec)

    def do_close_all(self):
        self.shut_all()

    def do_info(self, spec, snapshot):
        with self.at(spec, snapshot) as image:
            try:
                parent = list(image.parent_info())
            except rbd.ImageNotFound:
                parent = None
            flags = image.flags()
            return {
                "id": image.id(), "size": image.size(), "object_size": image.stat()["obj_size"],
                "stripe_unit": image.stripe_unit(), "stripe_count": image.stripe_count(),
                "features": feature_names(image.features()), "overlap": image.overlap(),
                "parent": parent,
                "object_map_invalid": bool(flags & rbd.RBD_FLAG_OBJECT_MAP_INVALID),
                "fast_diff_invalid": bool(flags & rbd.RBD_FLAG_FAST_DIFF_INVALID),
            }

    def do_flatten(self, spec):
        self.image(spec).flatten()

    def do_resize(self, spec, size):
        self.image(spec).resize(size, True)

    def do_metadata_set(self, spec, key, value):
        self.image(spec).metadata_set(key, value)

    def do_metadata_remove(self, spec, key):
        self.image(spec).metadata_remove(key)

    def do_metadata(self, spec):
        with self.at(spec, None) as image:
            return dict(image.metadata_list())

    def do_metadata_get(self, spec, key):
        with self.at(spec, None) as image:
            try:
                return image.metadata_get(key)
            except KeyError:
                return None

    def do_watchers(self, spec):
        with self.at(spec, None) as image:
            return [watcher["addr"] for watcher in image.watchers_list()]

    def do_update_features(self, spec, features, enabled):
        self.image(spec).update_features(feature_bits(features), enabled)

    def do_rebuild_object_map(self, spec, snapshot):
        # The method of python3-rbd 16 takes no arguments, not even the image.
        command = ["rbd", "-c", self.conf, "object-map", "rebuild", "--no-progress", "--pool", spec["pool"],
                   "--namespace", spec["namespace"], "--image", spec["image"]]
        if snapshot is not None:
            command += ["--snap", snapshot]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{command}: {done.stderr.decode(errors='replace')}")

    # --- Content

    def do_write(self, spec, offset, length, seed):
        image = self.image(spec)
        noise = random.Random(seed)
        for start in range(0, length, CHUNK):
            image.write(noise.randbytes(min(CHUNK, length - start)), offset + start)

    def do_fill(self, spec, offset, length, byte):
        image = self.image(spec)
        for start in range(0, length, CHUNK):
            image.write(bytes([byte]) * min(CHUNK, length - start), offset + start)

    def do_write_bytes(self, spec, offset, values):
        self.image(spec).write(bytes(values), offset)

    def do_discard(self, spec, offset, length):
        self.image(spec).discard(offset, length)

    def do_write_zeroes(self, spec, offset, length):
        self.image(spec).write_zeroes(offset, length)

    def do_read(self, spec, snapshot, path):
        """Writes the image to a sparse file, or nowhere, and tells its SHA-256."""
        digest = hashlib.sha256()
        file = open(path, "wb") if path is not None else None
        try:
            with self.at(spec, snapshot) as image:
                size = image.size()
                for start in range(0, size, CHUNK):
                    length = min(CHUNK, size - start)
                    data = image.read(start, length)
                    if len(data) != length:
                        raise RuntimeError(f"{len(data)} of {length} bytes came at offset {start}")
                    digest.update(data)
                    if file is not None and data.count(0) != length:
                        file.seek(start)
                        file.write(data)
            if file is not None:
                file.truncate(size)
        finally:
            if file is not None:
                file.close()
        return digest.hexdigest()

    def do_changes(self, spec, snapshot):
        found = []
        with self.at(spec, None) as image:
            image.diff_iterate(0, image.size(), snapshot, lambda *extent: found.append(extent[:2]),
                               include_parent=False, whole_object=False)
        return found

    def do_write_late(self, spec, snapshot, objects):
        """Fills objects as a client does that has not heard of the image's snapshots."""
        with self.at(spec, snapshot) as image:
            prefix, size = image.block_name_prefix(), image.stat()["obj_size"]
        librados = ctypes.CDLL("librados.so.2")
        cluster, ioctx = ctypes.c_void_p(), ctypes.c_void_p()

        def call(name, *arguments):
            code = getattr(librados, "rados_" + name)(*arguments)
            if code is not None and code < 0:
                raise OSError(-code, name)

        call("create2", ctypes.byref(cluster), b"ceph", b"client.admin", ctypes.c_uint64(0))
        try:
            call("conf_read_file", cluster, self.conf.encode())
            call("connect", cluster)
            call("ioctx_create", cluster, spec["pool"].encode(), ctypes.byref(ioctx))
            librados.rados_ioctx_set_namespace(ioctx, spec["namespace"].encode())
            call("ioctx_selfmanaged_snap_set_write_ctx", ioctx, ctypes.c_uint64(0), None, 0)
            for number in objects:
                data = random.Random(number).randbytes(size)
                call("write", ioctx, b"%s.%016x" % (prefix.encode(), number), data, ctypes.c_size_t(size),
                     ctypes.c_uint64(0))
            librados.rados_ioctx_destroy(ioctx)
        finally:
            librados.rados_shutdown(cluster)

    # --- Snapshots

    def do_snap_create(self, spec, snapshot):
        image = self.image(spec)
        image.create_snap(snapshot)
        return image.snap_get_id(snapshot)

    def do_snap_remove(self, spec, snapshot):
        self.image(spec).remove_snap(snapshot)

    def do_snap_rename(self, spec, snapshot, name):
        self.image(spec).rename_snap(snapshot, name)

    def do_snap_protect(self, spec, snapshot):
        self.image(spec).protect_snap(snapshot)

    def do_snap_unprotect(self, spec, snapshot):
        self.image(spec).unprotect_snap(snapshot)

    def do_snaps(self, spec):
        with self.at(spec, None) as image:
            found = [{key: snap[key] for key in ("id", "size", "name")} for snap in image.list_snaps()]
        return sorted(found, key=lambda snap: snap["id"])

    def do_rollback(self, spec, snapshot):
        self.image(spec).rollback_to_snap(snapshot)


FEATURES = {
    "layering": rbd.RBD_FEATURE_LAYERING,
    "striping": rbd.RBD_FEATURE_STRIPINGV2,
    "exclusive-lock": rbd.RBD_FEATURE_EXCLUSIVE_LOCK,
    "object-map": rbd.RBD_FEATURE_OBJECT_MAP,
    "fast-diff": rbd.RBD_FEATURE_FAST_DIFF,
    "deep-flatten": rbd.RBD_FEATURE_DEEP_FLATTEN,
    "journaling": rbd.RBD_FEATURE_JOURNALING,
    "data-pool": rbd.RBD_FEATURE_DATA_POOL,
    "operations": rbd.RBD_FEATURE_OPERATIONS,
}


def feature_bits(names):
    return None if names is None else sum(FEATURES[name] for name in set(names))


def feature_names(bits):
    return [name for name, bit in FEATURES.items() if bits & bit]


def read_requests(requests):
    for line in sys.stdin.buffer:
        requests.put(line)
    requests.put(None)
    time.sleep(GRACE)
    # librbd hangs; nobody is left who could wait for it.
    os._exit(1)


def main():
    requests = queue.Queue()
    threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
    driver = None
    while (line := requests.get()) is not None:
        try:
            request = json.loads(line)
            command = request.pop("do")
            if command == "connect":
                driver = Driver(**request)
                answer = {"ok": None}
            else:
                answer = {"ok": getattr(driver, "do_" + command)(**request)}
        except Exception as error:
            number = getattr(error, "errno", None)
            text = str(error) or repr(error)
            answer = {"error": f"{type(error).__name__}: {text}",
                      "errno": abs(number) if isinstance(number, int) else None}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    if driver is not None:
        driver.shut_all()
    # Librados has nothing left to save, and its shutdown may wait for a cluster that is gone.
    os._exit(0)


main()
