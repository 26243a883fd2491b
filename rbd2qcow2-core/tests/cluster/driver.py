"""A second client of a Ceph cluster, written on python3-rados and python3-rbd, for tests.

Reads one JSON object a line from stdin: {"do": COMMAND, ...arguments}. Answers each with one
line: {"ok": RESULT} or {"error": TEXT, "errno": NUMBER or null}. Ends when stdin ends, so also when
its parent dies. `driver.rs` is the other side and says what each command means.

Images stay open for writing between commands, as a virtual machine holds them, until "close".
"""

import ctypes
import errno
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
        self.stale = None

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

    def do_deep_copy(self, spec, to):
        with self.at(spec, None) as image:
            image.deep_copy(self.pool(to["pool"], to["namespace"]), to["image"])

    def do_trash_move(self, spec):
        with self.at(spec, None) as image:
            number = image.id()
        self.shut(spec)
        rbd.RBD().trash_move(self.pool(spec["pool"], spec["namespace"]), spec["image"])
        return number

    def do_trash_restore(self, spec, id):
        rbd.RBD().trash_restore(self.pool(spec["pool"], spec["namespace"]), id, spec["image"])

    def do_trash_remove(self, spec, id):
        rbd.RBD().trash_remove(self.pool(spec["pool"], spec["namespace"]), id, force=True)

    def do_migration_prepare(self, spec, to, order, features, stripe_unit, stripe_count):
        self.shut(spec)
        rbd.RBD().migration_prepare(self.pool(spec["pool"], spec["namespace"]), spec["image"],
                                    self.pool(to["pool"], to["namespace"]), to["image"],
                                    order=order, features=feature_bits(features),
                                    stripe_unit=stripe_unit, stripe_count=stripe_count)

    def do_migration_execute(self, spec):
        self.shut(spec)
        rbd.RBD().migration_execute(self.pool(spec["pool"], spec["namespace"]), spec["image"])

    def do_migration_commit(self, spec):
        self.shut(spec)
        rbd.RBD().migration_commit(self.pool(spec["pool"], spec["namespace"]), spec["image"])

    def do_migration_abort(self, spec):
        self.shut(spec)
        rbd.RBD().migration_abort(self.pool(spec["pool"], spec["namespace"]), spec["image"])

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
                # There is none, or it is in the trash.
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

    def do_check_object_map(self, spec, snapshot):
        command = ["rbd", "-c", self.conf, "object-map", "check", "--no-progress", "--pool", spec["pool"],
                   "--namespace", spec["namespace"], "--image", spec["image"]]
        if snapshot is not None:
            command += ["--snap", snapshot]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)

    def do_children(self, spec):
        with self.at(spec, None) as image:
            return [child["image"] for child in image.list_children2()]

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

    def do_read_objects(self, spec, snapshot, path):
        """As do_read, from the objects themselves: no object map is looked at."""
        with self.at(spec, snapshot) as image:
            number = None if snapshot is None else image.snap_get_id(snapshot)
            data = self.objects_of(image, number, (spec["pool"], spec["namespace"]), image.size())
        if path is not None:
            with open(path, "wb") as file:
                for start in range(0, len(data), CHUNK):
                    part = data[start:start + CHUNK]
                    if part.count(0) != len(part):
                        file.seek(start)
                        file.write(part)
                file.truncate(len(data))
        return hashlib.sha256(data).hexdigest()

    def objects_of(self, image, number, pool, size):
        """The first bytes of an image that is open at the snapshot of this number (None: its head)."""
        if image.features() & MIGRATING:
            # It has its source for a parent, in ways of its own.
            return b"".join(image.read(start, min(CHUNK, size - start)) for start in range(0, size, CHUNK))
        overlap = min(image.overlap(), size)
        data = bytearray(self.parent_of(image, overlap) if overlap else b"")
        data.extend(bytes(size - len(data)))
        prefix, length = image.block_name_prefix(), image.stat()["obj_size"]
        unit, count = image.stripe_unit(), image.stripe_count()
        period = length * count
        ioctx = self.cluster.open_ioctx(pool[0])
        ioctx.set_namespace(pool[1])
        try:
            if number is not None:
                ioctx.set_read(number)
            reads = [self.start_read(ioctx, f"{prefix}.{index:016x}", length)
                     for index in range(-(-size // period) * count)]
            for index, read in enumerate(reads):
                if (found := read()) is None:
                    continue
                found = found.ljust(length, b"\0")
                first = index // count * period + index % count * unit
                for part in range(length // unit):
                    start = first + part * unit * count
                    end = min(start + unit, size)
                    if start < end:
                        data[start:end] = found[part * unit:part * unit + end - start]
        finally:
            ioctx.close()
        return bytes(data)

    def parent_of(self, image, overlap):
        above = image.get_parent_image_spec()
        pool = (above["pool_name"], above["pool_namespace"])
        # By its id, as it may be in the trash. A snapshot that is there has a name that nobody chose.
        with rbd.Image(self.pool(*pool), image_id=image.parent_id(), read_only=True) as parent:
            number = next(snap["id"] for snap in parent.list_snaps() if snap["name"] == above["snap_name"])
            parent.set_snap_by_id(number)
            return self.objects_of(parent, number, pool, overlap).ljust(overlap, b"\0")

    def start_read(self, ioctx, name, length):
        """Reads an object; gives what waits for it, and then gives its bytes, or None without it."""
        done = threading.Event()
        got = []

        def complete(completion, data):
            got.extend((completion.get_return_value(), data))
            done.set()

        ioctx.aio_read(name, length, 0, complete)

        def wait():
            done.wait()
            if got[0] == -errno.ENOENT:
                return None
            if got[0] < 0:
                raise rados.OSError(f"reading object {name}", errno=-got[0])
            # Of an object without a byte python3-rados 16 gives memory that nobody has written.
            return got[1][:got[0]]

        return wait

    def do_changes(self, spec, snapshot):
        found = []
        with self.at(spec, None) as image:
            image.diff_iterate(0, image.size(), snapshot, lambda *extent: found.append(extent[:2]),
                               include_parent=False, whole_object=False)
        return found

    # --- A client that has not heard of the newest snapshots

    def do_object_exists(self, spec, object):
        with self.at(spec, None) as image:
            name = f"{image.block_name_prefix()}.{object:016x}"
        try:
            self.pool(spec["pool"], spec["namespace"]).stat(name)
        except rados.ObjectNotFound:
            return False
        return True

    def do_stale_write(self, spec, object, offset, length, seed, seq, snaps):
        with self.at(spec, None) as image:
            name = f"{image.block_name_prefix()}.{object:016x}"
        if self.stale is None:
            self.stale = Stale(self.conf)
        self.stale.write(spec["pool"], spec["namespace"], name, offset,
                         random.Random(seed).randbytes(length), seq, snaps)

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
            found = [{key: snap[key] for key in ("id", "size", "name")} for snap in image.list_snaps()
                     if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER]
        return sorted(found, key=lambda snap: snap["id"])

    def do_snap_numbers(self, spec):
        with self.at(spec, None) as image:
            return sorted((snap["id"] for snap in image.list_snaps()), reverse=True)

    def do_rollback(self, spec, snapshot):
        self.image(spec).rollback_to_snap(snapshot)


class Stale:
    """Writes objects through librados alone, with any snapshot context: librbd knows nothing of it."""

    def __init__(self, conf):
        self.lib = ctypes.CDLL("librados.so.2")
        self.cluster = ctypes.c_void_p()
        self.check(self.lib.rados_create2(ctypes.byref(self.cluster), b"ceph", b"client.admin",
                                          ctypes.c_uint64(0)))
        self.check(self.lib.rados_conf_read_file(self.cluster, conf.encode()))
        self.check(self.lib.rados_connect(self.cluster))

    def check(self, code):
        if code < 0:
            raise rados.OSError("librados", errno=-code)

    def write(self, pool, namespace, name, offset, data, seq, snaps):
        ioctx = ctypes.c_void_p()
        self.check(self.lib.rados_ioctx_create(self.cluster, pool.encode(), ctypes.byref(ioctx)))
        try:
            self.lib.rados_ioctx_set_namespace(ioctx, namespace.encode())
            numbers = (ctypes.c_uint64 * len(snaps))(*sorted(snaps, reverse=True))
            self.check(self.lib.rados_ioctx_selfmanaged_snap_set_write_ctx(
                ioctx, ctypes.c_uint64(seq), numbers, ctypes.c_int(len(snaps))))
            self.check(self.lib.rados_write(ioctx, name.encode(), data, ctypes.c_size_t(len(data)),
                                            ctypes.c_uint64(offset)))
        finally:
            self.lib.rados_ioctx_destroy(ioctx)


# python3-rbd 16 does not name it.
MIGRATING = 1 << 9

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
    "migrating": MIGRATING,
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
