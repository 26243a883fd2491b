"""What is measured: workloads, and for each the commands that do it.

All commands are lines of bash. What stands before `&&` in a contender's command is part of its time:
a backup of a machine that is running begins with a snapshot, whoever makes it. Whoever leaves files in
the page cache gets a `sync`, since a backup that a power failure takes is none.
"""

import dataclasses
import json
import os
import random
import shlex
import subprocess

import python_field
from measure import run
from python_field import PythonField

GIB = 1 << 30
HERE = os.path.dirname(os.path.abspath(__file__))

# `cold` is the day of a restore: nothing of the file is in the page cache.
# `forget` removes the snapshots of image $1 but for those that it had when `remember` was called.
PREAMBLE = r"""
cold() { sync; echo 1 >/proc/sys/vm/drop_caches; }
snapshots() { rbd snap ls --format json "rbd/$1" | jq -r '.[].name'; }
remember() { snapshots "$1" | sort >"$WORK/$1.snapshots"; }
forget() {
    local name
    comm -13 "$WORK/$1.snapshots" <(snapshots "$1" | sort) | while read -r name; do
        rbd snap rm --no-progress "rbd/$1@$name"
    done
}
"""


@dataclasses.dataclass
class Contender:
    """One way to do a workload."""

    name: str
    command: str  # what is measured
    before: str = ""  # what must be done before each run
    after: str = ""  # what undoes the run
    places: tuple = ()  # directories whose growth is what it stores
    figure: str = ""  # the key of seconds that its JSON tells of itself
    items: int = 0  # what it deals with, where that is counted and not its bytes
    check: str = ""  # fails unless the result is right; is run once


@dataclasses.dataclass
class Workload:
    """Contenders side by side."""

    key: str
    title: str
    contenders: list
    cannot: dict = dataclasses.field(default_factory=dict)  # contender: why it has no run


# Where backups go that are thrown away, as bash sees it.
OUT = "$WORK/out"
FRESH = f"rm -rf {OUT}; mkdir {OUT}"


def export_diff(image, file):
    """What scripts do for an increment."""
    return (f"rbd snap create --no-progress {image}@peer && rbd export-diff --no-progress --from-snap base "
            f"{image}@peer {file} && sync {file}")


class Bench:
    """The directory that everything happens in, and the programs."""

    def __init__(self, program, floor, python, work, only):
        self.program, self.floor, self.python, self.work = program, floor, python, work
        self.only = only  # parts of names
        self.images = set()
        self.field = PythonField(self, Contender)

    def wants(self, name):
        """Whether a contender of this name is to be measured."""
        return not self.only or any(part in name for part in self.only)

    def sh(self, command):
        """Runs something that is not measured."""
        return run(self.line(command)).out

    def each(self, contenders, **fields):
        """Sets what contenders have in common but for those that differ, and that what they store is counted."""
        for contender in contenders:
            contender.places = (f"{self.work}/out",)
            for field, value in fields.items():
                if not getattr(contender, field):
                    setattr(contender, field, value)
        return contenders

    def line(self, command):
        names = {"WORK": self.work, "R": self.program, "FLOOR": self.floor, "PYTHON": self.python}
        given = "".join(f"{name}={shlex.quote(value)}\n" for name, value in names.items())
        return given + PREAMBLE + python_field.PREAMBLE + command

    def fill(self, *arguments):
        # Debian's interpreter: python3-rados is built for it.
        command = ["/usr/bin/python3", os.path.join(HERE, "images.py"), *map(str, arguments)]
        subprocess.run(command, check=True)

    def create(self, name, size, *fills):
        """An image, unless it is there from another workload."""
        if name in self.images:
            return
        self.images.add(name)
        self.fill("create", name, size)
        for fill in fills:
            self.fill(fill[0], name, *fill[1:])

    def extents(self, name, base=None):
        """A file of what a backup must read, for the floor."""
        since = f"--from-snap {base} " if base else ""
        found = json.loads(self.sh(f"rbd diff {since}--format json rbd/{name}"))
        path = f"{self.work}/{name}.extents"
        with open(path, "w", encoding="ascii") as file:
            for extent in found:
                if extent["exists"] != "false":
                    print(extent["offset"], extent["length"], file=file)
        return path

    # --- Contenders that more than one workload has

    def floors(self, name, extents):
        """What nobody can do without."""
        return self.each([
            Contender("floor: read", f"$FLOOR rbd {name} floor <{extents}"),
            Contender("floor: read, write", f"$FLOOR rbd {name} floor {OUT}/floor.data <{extents}"),
        ], before=FRESH, after=f"forget {name}")

    def full(self, name):
        """All who can copy a whole image."""
        snap = f"rbd/{name}@peer"
        take = f"rbd snap create --no-progress {snap} && "
        raw = f"-f raw rbd:{snap}"
        same = f"qemu-img compare -q -f {{}} -F raw {OUT}/file rbd:{snap}"

        def ours(label, options):
            newest = f"$(ls {OUT}/{name}/*.qcow2)"
            snapshot = f"rbd/{name}@$(snapshots {name} | tail -n 1)"
            return Contender(label, f"$R -q backup {options} rbd {OUT} {name}",
                             check=f"qemu-img compare -q -f qcow2 -F raw {newest} rbd:{snapshot}")

        def peer(label, command, form):
            return Contender(label, take + command, check=same.format(form) if form else "")

        nbd = ("nbdcopy --flush --requests=64 -- [ qemu-nbd -r --cache=none -f raw rbd:{} ] "
               "[ qemu-nbd --cache=none --aio=native --discard=unmap --detect-zeroes=unmap -f qcow2 {}/file ]")
        convert = "qemu-img convert -O qcow2 -t none -W -m 16"
        return self.each([
            ours("rbd2qcow2", ""),
            ours("rbd2qcow2 zstd", "--compression zstd"),
            ours("rbd2qcow2 qemu-nbd", "--writer qemu-nbd"),
            peer("qemu-img convert", f"{convert} {raw} {OUT}/file", "qcow2"),
            peer("qemu-img convert -c zstd", f"{convert} -c -o compression_type=zstd {raw} {OUT}/file", "qcow2"),
            peer("nbdcopy", f"qemu-img create -q -f qcow2 {OUT}/file $(rbd info --format json rbd/{name} "
                 f"| jq .size) && {nbd.format(snap, OUT)}", "qcow2"),
            peer("rbd export", f"rbd export --no-progress {snap} {OUT}/file && sync {OUT}/file", "raw"),
            peer("rbd export-diff", f"rbd export-diff --no-progress {snap} {OUT}/file && sync {OUT}/file", ""),
        ] + self.field.full(name), before=FRESH, after=f"forget {name}")

    def base(self, name):
        """Brings everybody to what the image is now, from where increments are measured."""
        self.sh(f"""
            mkdir -p $WORK/base.plain $WORK/base.zstd $WORK/base.nbd
            for to in plain:none zstd:zstd; do
                $R -q backup --keep-snapshots 9 --compression ${{to#*:}} rbd $WORK/base.${{to%:*}} {name}
            done
            $R -q backup --keep-snapshots 9 --writer qemu-nbd rbd $WORK/base.nbd {name}
            rbd snap rm --no-progress rbd/{name}@base 2>/dev/null || true
            rbd snap create --no-progress rbd/{name}@base
            remember {name}
        """)
        self.field.base(name)

    def increment(self, name):
        """All who can copy what has changed since `base`. Older snapshots stay, with all of them."""

        def ours(label, base, options):
            newest = f"$(ls {OUT}/{name}/*.qcow2 | tail -n 1)"
            snapshot = f"rbd/{name}@$(comm -13 $WORK/{name}.snapshots <(snapshots {name} | sort))"
            return Contender(
                label, f"$R --json -q backup --keep-snapshots 9 {options} rbd {OUT} {name}",
                before=f"rm -rf {OUT}; cp -al $WORK/base.{base} {OUT}", figure="diff_seconds",
                check=f"qemu-img compare -q -f qcow2 -F raw {newest} rbd:{snapshot}")

        contenders = self.each([
            ours("rbd2qcow2", "plain", ""),
            ours("rbd2qcow2 zstd", "zstd", "--compression zstd"),
            ours("rbd2qcow2 qemu-nbd", "nbd", "--writer qemu-nbd"),
            Contender("rbd export-diff", export_diff(f"rbd/{name}", f"{OUT}/file"), before=FRESH),
        ] + self.field.increment(name), after=f"forget {name}")
        return self.floors(name, self.extents(name, "base")) + contenders


NO_INCREMENT = {
    "qemu-img convert": "copies all of it, every time",
    "nbdcopy": "copies all of it, every time",
    "rbd export": "copies all of it, every time",
}


def random_full(b):
    b.create("noise", 8 * GIB, ("fill", 0, 3 * GIB))
    b.sh("remember noise")
    contenders = b.floors("noise", b.extents("noise")) + b.full("noise")
    return Workload("full", "Full backup, 3 GiB of random data in an image of 8 GiB", contenders)


def debian_full(b):
    if "debian" not in b.images:
        # Beside the cluster, in memory: it is a hundred thousand small files.
        place = os.path.dirname(os.environ["CEPH_CONF"])
        b.sh(f"""
            tree=$(mktemp -d -p {place})
            for part in bin share lib; do
                # What a machine is made of, but no more than a few GiB.
                find /usr/$part -xdev \\( -type f -o -type l \\) -size -8M -print0
            done >$tree.names
            tar --null --no-recursion -T $tree.names -cf - 2>/dev/null | head -c 2684354560 |
                tar -C $tree -xf - 2>/dev/null || true
            mkfs.ext4 -q -F -d $tree {place}/debian.raw 4G
            rm -rf $tree $tree.names
        """)
        b.create("debian", 4 * GIB, ("copy", f"{place}/debian.raw"))
        b.sh(f"rm {place}/debian.raw")
    b.sh("remember debian")
    contenders = b.floors("debian", b.extents("debian")) + b.full("debian")
    return Workload("debian", "Full backup of a file system of Debian's /usr", contenders)


def sparse_full(b):
    b.create("sparse", 100 * GIB, ("fill", 0, 64 << 20), ("sprinkle", 256))
    b.sh("remember sparse")
    contenders = b.floors("sparse", b.extents("sparse")) + b.full("sparse")
    return Workload("sparse", "Full backup of an image of 100 GiB that holds 65 MiB", contenders)


def several(b):
    names = [f"several{number}" for number in range(4)]
    for name in names:
        b.create(name, GIB, ("fill", 0, GIB // 2))
        b.sh(f"remember {name}")
    listed = " ".join(names)
    convert = ("rbd snap create --no-progress rbd/$name@peer && "
               f"qemu-img convert -O qcow2 -t none -W -m 16 -f raw rbd:rbd/$name@peer {OUT}/$name")
    contenders = b.each([
        Contender("rbd2qcow2", f"$R -q backup rbd {OUT} {listed}"),
        Contender("qemu-img convert", f"for name in {listed}; do {convert}; done"),
    ], before=FRESH, after=f"for name in {listed}; do forget $name; done")
    return Workload("several", "Full backup of 4 images of 512 MiB of random data each", contenders)


def unchanged(b):
    b.create("noise", 8 * GIB, ("fill", 0, 3 * GIB))
    b.base("noise")
    return Workload("unchanged", "Nothing has changed, 3 GiB of data", b.increment("noise"), NO_INCREMENT)


def rewritten(b):
    b.create("noise", 8 * GIB, ("fill", 0, 3 * GIB))
    b.base("noise")
    b.fill("rewrite", "noise", 1, 1)
    return Workload("rewritten", "1 % of the objects were rewritten", b.increment("noise"), NO_INCREMENT)


def scattered(b):
    b.create("noise", 8 * GIB, ("fill", 0, 3 * GIB))
    b.base("noise")
    b.fill("scatter", "noise", 4096, 4096, random.randrange(1 << 30))
    title = "4096 pages of 4 KiB were written, anywhere in 8 GiB of which 3 GiB were data"
    return Workload("scattered", title, b.increment("noise"), NO_INCREMENT)


def fifty(b):
    names = [f"small{number:02}" for number in range(50)]
    for name in names:
        b.create(name, 64 << 20, ("fill", 0, 8 << 20))
    listed = " ".join(names)
    b.sh(f"""
        for to in plain nbd; do
            mkdir -p $WORK/fifty.$to
            writer=native; [[ $to == plain ]] || writer=qemu-nbd
            $R -q backup -j 8 --keep-snapshots 9 --writer $writer rbd $WORK/fifty.$to {listed}
        done
        for name in {listed}; do
            rbd snap create --no-progress rbd/$name@base
            remember $name
        done
    """)

    def ours(label, base, options):
        return Contender(label, f"$R -q backup --keep-snapshots 9 {options} rbd {OUT} {listed}",
                         before=f"rm -rf {OUT}; cp -al $WORK/fifty.{base} {OUT}", items=50)

    diff = export_diff("rbd/$name", f"{OUT}/$name")
    contenders = b.each([
        ours("rbd2qcow2", "plain", ""),
        ours("rbd2qcow2 -j 16", "plain", "-j 16"),
        ours("rbd2qcow2 -j 1 qemu-nbd", "nbd", "-j 1 --writer qemu-nbd"),
        Contender("rbd export-diff", f"for name in {listed}; do {diff}; done", before=FRESH, items=50),
    ], after=f"n=0; for name in {listed}; do forget $name & (( ++n % 8 )) || wait; done; wait")
    return Workload("fifty", "50 images of 64 MiB, unchanged", contenders, NO_INCREMENT)


def differences(b, key, title, name, objects):
    """Only the comparison with the snapshot before: what counts is `diff s`, and the wall time of `rbd diff`,
    whose snapshot is there before."""
    b.sh(f"""
        mkdir -p $WORK/base.{key}
        $R -q backup --keep-snapshots 9 rbd $WORK/base.{key} {name}
        rbd snap create --no-progress rbd/{name}@base
        remember {name}
    """)
    take = f"rbd snap create --no-progress rbd/{name}@peer"
    diff = f"rbd diff {{}}--from-snap base rbd/{name}@peer >/dev/null"

    def ours(options, items):
        return Contender(f"rbd2qcow2{options}", f"$R --json -q backup{options} --keep-snapshots 9 rbd {OUT} {name}",
                         before=f"rm -rf {OUT}; cp -al $WORK/base.{key} {OUT}", figure="diff_seconds", items=items)

    # Maps are read, and not objects, where dirty bits are believed.
    contenders = b.each([
        ours("", objects),
        ours(" --diff fast", 0),
        Contender("rbd diff", diff.format(""), before=take, items=objects),
        Contender("rbd diff --whole-object", diff.format("--whole-object "), before=take),
    ], after=f"forget {name}")
    return Workload(key, title, contenders)


def diff_sparse(b):
    b.create("tib", 1 << 40, ("sprinkle", 256))
    title = "Comparison of an unchanged image of 1 TiB that has 256 objects"
    return differences(b, "diff-sparse", title, "tib", 256)


def diff_full(b):
    b.create("objects", 128 * GIB, ("sprinkle", 32768))
    title = "Comparison of an unchanged image of 128 GiB that has all of its 32,768 objects"
    return differences(b, "diff-full", title, "objects", 32768)


def backed_up(b):
    """A full backup of the random image, in a directory of its own."""
    b.create("noise", 8 * GIB, ("fill", 0, 3 * GIB))
    if not os.path.isdir(f"{b.work}/whole"):
        b.sh("mkdir $WORK/whole; $R -q backup --keep-snapshots 9 rbd $WORK/whole noise")
        b.field.backed_up("noise")
    return "$(ls $WORK/whole/noise/*.qcow2)"


def restore(b):
    file = backed_up(b)
    size = f"rbd create --size $(qemu-img info --output json {file} | jq '.\"virtual-size\"')B rbd/restored && "
    raw = "qemu-nbd -r --cache=none -f qcow2 " + file
    contenders = b.each([
        Contender("rbd2qcow2", "$R -q restore $WORK/whole noise --to-rbd rbd/restored"),
        Contender("qemu-img convert -n", size + f"qemu-img convert -n -W -m 16 -f qcow2 -O raw {file} rbd:rbd/restored"),
        Contender("qemu-img convert -n -t none",
                  size + f"qemu-img convert -n -W -m 16 -t none -T none -f qcow2 -O raw {file} rbd:rbd/restored"),
        Contender("nbdcopy", size + f"nbdcopy --flush --requests=64 --destination-is-zero -- [ {raw} ] "
                  "[ qemu-nbd --cache=none -f raw rbd:rbd/restored ]"),
    ] + b.field.restores("noise", "rbd/restored"), before="cold", after="rbd rm --no-progress rbd/restored",
        check=f"qemu-img compare -q -f qcow2 -F raw {file} rbd:rbd/restored")
    cannot = {"rbd import-diff": "reads only what export-diff wrote", "rbd import": "reads no qcow2"}
    return Workload("restore", "Restore of 3 GiB into a new RBD image", contenders, cannot)


def overwrite(b):
    file = backed_up(b)
    b.sh("$R -q restore $WORK/whole noise --to-rbd rbd/overwritten")
    change = f"/usr/bin/python3 {HERE}/images.py rewrite overwritten 1 7"
    raw = "qemu-nbd -r --cache=none -f qcow2 " + file
    contenders = b.each([
        Contender("rbd2qcow2 --overwrite", "$R -q restore $WORK/whole noise --to-rbd rbd/overwritten --overwrite"),
        Contender("qemu-img convert -n", f"qemu-img convert -n -W -m 16 -f qcow2 -O raw {file} rbd:rbd/overwritten"),
        Contender("qemu-img convert -n -t none",
                  f"qemu-img convert -n -W -m 16 -t none -T none -f qcow2 -O raw {file} rbd:rbd/overwritten"),
        Contender("nbdcopy", f"nbdcopy --flush --requests=64 -- [ {raw} ] "
                  "[ qemu-nbd --cache=none -f raw rbd:rbd/overwritten ]"),
    ], before=f"{change}; cold", check=f"qemu-img compare -q -f qcow2 -F raw {file} rbd:rbd/overwritten")
    return Workload("overwrite", "Restore of 3 GiB over an image of which 1 % differs", contenders)


def verify(b):
    file = backed_up(b)
    snapshot = "rbd:rbd/noise@$(jq -r .snapshot $WORK/whole/noise/*.json)"
    contenders = b.each([
        Contender("rbd2qcow2 verify", "$R -q verify $WORK/whole noise"),
        Contender("rbd2qcow2 verify --source", "$R -q verify --source $WORK/whole noise"),
        Contender("qemu-img check", f"qemu-img check -q {file}"),
        Contender("qemu-img compare", f"qemu-img compare -q -f qcow2 -F raw {file} {snapshot}"),
        Contender("sha256sum", f"sha256sum {file} >/dev/null"),
    ] + b.field.verifies("noise"), before="cold")
    return Workload("verify", "Verification of a point of 3 GiB", contenders)


def prune(b):
    b.create("noise", 8 * GIB, ("fill", 0, 3 * GIB))
    if not os.path.isdir(f"{b.work}/chain"):
        b.sh("mkdir $WORK/chain")
        for seed in range(5):
            b.sh("$R -q backup --keep-snapshots 9 rbd $WORK/chain noise")
            b.fill("scatter", "noise", 4096, 4096, 1000 + seed)
    layers = f"mapfile -t layers < <(ls {OUT}/noise/*.qcow2) && chmod 600 {OUT}/noise/*.qcow2 && "
    oldest = f"$(basename $(ls {OUT}/noise/*.qcow2 | head -n 1) .qcow2)"
    contenders = b.each([
        Contender("rbd2qcow2 prune", f"$R -q prune {OUT} {oldest}"),
        Contender("qemu-img rebase", layers + "qemu-img rebase -t none -b '' \"${layers[1]}\" && rm \"${layers[0]}\""),
        Contender("qemu-img commit",
                  layers + "qemu-img commit -q -t none \"${layers[1]}\" && mv -f \"${layers[0]}\" \"${layers[1]}\""),
    ], before=f"rm -rf {OUT}; cp -a $WORK/chain {OUT}; cold")
    cannot = {"rbd export-diff": "diffs cannot be removed but by rbd merge-diff of files", "qemu-img convert": "keeps no chain"}
    return Workload("prune", "Removal of the oldest of 5 points, a full one of 3 GiB", contenders, cannot)


ALL = [
    random_full, debian_full, sparse_full, several, unchanged, rewritten, restore, overwrite, verify, scattered, fifty,
    diff_sparse, diff_full, prune,
]
