"""Fills images of the cluster, with a client of its own. A program: images.py COMMAND ARGUMENT..."""

import os
import random
import sys
import threading

import rados
import rbd

OBJECT = 4 << 20
FLIGHT = 16
FEATURES = "layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"


class Writer:
    """Writes without waiting for each answer, up to a number of requests."""

    def __init__(self, image):
        self.image, self.room, self.failed = image, threading.Semaphore(FLIGHT), []

    def write(self, offset, data):
        self.room.acquire()

        def done(completion):
            if completion.get_return_value() < 0:
                self.failed.append(offset)
            self.room.release()

        self.image.aio_write(data, offset, done)

    def finish(self):
        for _ in range(FLIGHT):
            self.room.acquire()
        self.image.flush()
        if self.failed:
            sys.exit(f"cannot write at {self.failed[0]}")


def create(pool, name, size):
    features = sum(getattr(rbd, "RBD_FEATURE_" + f.upper().replace("-", "_")) for f in FEATURES)
    rbd.RBD().create(pool, name, size, order=22, old_format=False, features=features)


def fill(image, start, length):
    """Data that nothing compresses."""
    writer = Writer(image)
    for offset in range(start, start + length, OBJECT):
        writer.write(offset, os.urandom(min(OBJECT, start + length - offset)))
    writer.finish()


def scatter(image, count, length, seed):
    """Pages of data, anywhere."""
    writer, chosen = Writer(image), random.Random(seed)
    for page in chosen.sample(range(image.size() // length), count):
        writer.write(page * length, os.urandom(length))
    writer.finish()


def rewrite(image, percent, seed):
    """Whole objects anew, of those that the image's first data take."""
    writer, chosen = Writer(image), random.Random(seed)
    objects = 3 * 256
    for number in chosen.sample(range(objects), objects * percent // 100):
        writer.write(number * OBJECT, os.urandom(OBJECT))
    writer.finish()


def sprinkle(image, count):
    """A page in each of many objects, evenly over the image."""
    writer, step = Writer(image), image.size() // count // OBJECT * OBJECT
    for number in range(count):
        writer.write(number * step, os.urandom(4096))
    writer.finish()


def copy(image, path):
    """A file's data; its holes are left out."""
    writer = Writer(image)
    with open(path, "rb") as file:
        for offset in range(0, os.path.getsize(path), OBJECT):
            data = os.pread(file.fileno(), OBJECT, offset)
            if data.count(0) < len(data):
                writer.write(offset, data)
    writer.finish()


def main(command, name, *arguments):
    with rados.Rados(conffile=os.environ["CEPH_CONF"]) as cluster, cluster.open_ioctx("rbd") as pool:
        if command == "create":
            create(pool, name, int(arguments[0]))
            return
        with rbd.Image(pool, name) as image:
            if command == "copy":
                copy(image, arguments[0])
            else:
                todo = {"fill": fill, "scatter": scatter, "rewrite": rewrite, "sprinkle": sprinkle}
                todo[command](image, *map(int, arguments))


main(*sys.argv[1:])
