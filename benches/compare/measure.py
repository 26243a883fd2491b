"""One run of a command: its time, its processors, its memory, and what the cluster gave it."""

import dataclasses
import glob
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time

PAGE = os.sysconf("SC_PAGE_SIZE")
# Seconds between two looks at the memory of a command's processes.
LOOK = 0.02
# A command that takes longer than this hangs.
LIMIT = 900


class Failed(Exception):
    """A command ended with an error; its last words are in the message."""


@dataclasses.dataclass
class Run:
    """What one run took."""

    wall: float  # seconds
    cpu: float  # seconds, of all its processes
    memory: int  # bytes resident at once, of all its processes
    read: int  # bytes that the OSDs sent
    stored: int = 0  # bytes allocated in files, more than before
    out: str = ""  # what it printed


class Osds:
    """The counters of a cluster's OSDs, through their admin sockets."""

    def __init__(self, conf):
        with open(conf, encoding="utf-8") as file:
            sockets = re.findall(r"^admin socket = (.*)$", file.read(), re.M)
        pattern = re.sub(r"\$\w+", "*", sockets[-1])
        self.sockets = [path for path in glob.glob(pattern) if "osd" in os.path.basename(path)]
        if not self.sockets:
            raise Failed(f"no OSD has an admin socket like {pattern}")

    def sent(self):
        """Bytes that clients have read since the OSDs started."""
        return sum(ask(path, "perf dump")["osd"]["op_r_out_bytes"] for path in self.sockets)


def ask(path, prefix):
    """One question to a daemon of Ceph."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(path)
        server.sendall(json.dumps({"prefix": prefix}).encode() + b"\0")
        reader = server.makefile("rb")
        (length,) = struct.unpack(">I", reader.read(4))
        return json.loads(reader.read(length))


def descendants(pid):
    """A process and all that it has started, as far as they live."""
    found = [pid]
    for process in found:
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/children", encoding="ascii") as file:
                    found += [int(child) for child in file.read().split()]
        except OSError:
            pass
    return found


def resident(pid):
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def watch(pid, done, peak):
    while not done.wait(LOOK):
        peak[0] = max(peak[0], sum(map(resident, descendants(pid))))


def allocated(paths):
    """Bytes that the files below some places take on the disk."""
    total = 0
    for path in paths:
        for place, _, names in os.walk(path):
            total += sum(os.lstat(os.path.join(place, name)).st_blocks * 512 for name in names)
    return total


def run(command, osds=None, places=()):
    """Runs a line of bash, and waits for its end. Raises Failed unless that is a success."""
    before, stored = osds.sent() if osds else 0, allocated(places)
    with open("/dev/null", "rb") as null:
        start = time.monotonic()
        # A file, not a pipe: nobody needs to read it meanwhile.
        with open(os.path.join(os.environ.get("TMPDIR", "/tmp"), f"compare.{os.getpid()}.out"), "w+b") as out:
            os.unlink(out.name)
            child = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command],
                stdin=null, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )
            done, peak = threading.Event(), [0]
            watcher = threading.Thread(target=watch, args=(child.pid, done, peak))
            watcher.start()
            killer = threading.Timer(LIMIT, os.killpg, (child.pid, signal.SIGKILL))
            killer.start()
            try:
                _, status, usage = os.wait4(child.pid, 0)
                wall = time.monotonic() - start
            except BaseException:
                # Interrupted: nothing of it goes on alone.
                os.killpg(child.pid, signal.SIGKILL)
                os.wait4(child.pid, 0)
                raise
            finally:
                killer.cancel()
                done.set()
                watcher.join()
            child.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            text = out.read().decode(errors="replace")
    if child.returncode:
        last = command.strip().splitlines()[-1]
        raise Failed(f"status {child.returncode} of: {last}\n{text[-2000:]}")
    # The largest of its processes is known exactly; the sum of them only now and then.
    memory = max(peak[0], usage.ru_maxrss * 1024)
    sent = osds.sent() - before if osds else 0
    return Run(wall, usage.ru_utime + usage.ru_stime, memory, sent, allocated(places) - stored, text)
