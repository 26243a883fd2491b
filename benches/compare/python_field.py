"""The tools in Python that back RBD images up, benji and backy2: where they are, and their commands.

Neither compares images: what they read is what `rbd diff --whole-object` tells them ("hints"). Both keep blocks of
4 MiB, once each, so that every run begins with a store of its own.
"""

import dataclasses
import os
import re
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))

# `store` lays out $1's store from the directory $2, so that $2 stays as it is.
# `hints` has the arguments of `rbd diff`.
# `version` leaves backy2's name for the backup of image $2 at snapshot $1 in a file. A script would know it.
PREAMBLE = r"""
benji() { "$PYTHON/benji/bin/benji" --log-level ERROR -c "$WORK/out/benji/benji.yaml" "$@"; }
backy2() { "$PYTHON/backy2/bin/backy2" -c "$WORK/out/backy2/backy.cfg" "$@"; }
store() {
    rm -rf "$WORK/out" && mkdir "$WORK/out" && cp -al "$2" "$WORK/out/$1"
    # The blocks are never written to again, but the database is.
    cp -a --remove-destination "$2"/*.* "$WORK/out/$1/"
}
hints() { rbd diff --whole-object --format json "$@" >"$WORK/out/hints"; }
version() { backy2 -m ls -s "$1" "$2" | awk -F'|' 'END { print $7 }' >"$WORK/version"; }
"""


@dataclasses.dataclass
class Tool:
    """One of the two, and its lines of bash."""

    name: str
    init: str  # makes the database
    backup: str  # of {image} at {snapshot}
    since: str  # what is added to begin from `base`
    restore: str  # what was backed up at {snapshot}, to {scheme}{target}
    verify: str  # what was backed up at {snapshot}, without the image
    find: str = ":"  # what the last three need first, for a backup of {image} at {snapshot}

    @property
    def verifier(self):
        """What the tables call its verification."""
        return " ".join(self.verify.split()[:2])


TOOLS = [
    Tool("benji", "benji database-init",
         "benji backup --uid {image}-{snapshot} --snapshot {snapshot} --rbd-hints $WORK/out/hints {since} "
         "rbd:rbd/{image}@{snapshot} {image}",
         "--base-version {image}-base", "benji restore --sparse {image}-{snapshot} {scheme}:{target}",
         "benji deep-scrub {image}-{snapshot}"),
    Tool("backy2", "backy2 initdb",
         "backy2 backup -s {snapshot} -r $WORK/out/hints {since} rbd://rbd/{image}@{snapshot} {image}",
         "-f $(cat $WORK/version)",
         "backy2 restore --sparse $(cat $WORK/version) {scheme}://{target}", "backy2 scrub $(cat $WORK/version)",
         "version {snapshot} {image}"),
]


class PythonField:
    """The tools that are wanted and can be installed, configured for stores in the directory `out` of the bench's."""

    def __init__(self, bench, contender):
        self.bench, self.contender = bench, contender
        self.tools = []
        # Of each tool its version, or why it is not there.
        self.found = {}
        wanted = [tool for tool in TOOLS if bench.wants(tool.name) or bench.wants(tool.verifier)]
        if not wanted:
            return
        os.makedirs(bench.python, exist_ok=True)
        os.makedirs(f"{bench.work}/stores", exist_ok=True)
        told = subprocess.run([os.path.join(HERE, "install-python-peers"), bench.python, f"{bench.work}/out"],
                              check=True, capture_output=True, text=True).stdout
        for tool in wanted:
            words = self.found[tool.name] = re.search(rf"^{tool.name}: (.*)$", told, re.M).group(1)
            if words.startswith("not installable"):
                continue
            self.found[tool.name] += ", " + bench.sh(f"$PYTHON/{tool.name}/bin/python --version").strip()
            self.tools.append(tool)
            bench.sh(f"{tool.init}; mv $WORK/out/{tool.name} {self.empty(tool)}")

    @staticmethod
    def empty(tool):
        return f"$WORK/stores/{tool.name}.empty"

    @staticmethod
    def based(tool):
        return f"$WORK/stores/{tool.name}.base"

    def base(self, image):
        """Brings them to the image's snapshot `base`."""
        for tool in self.tools:
            backup = tool.backup.format(image=image, snapshot="base", since="")
            self.bench.sh(f"""
                store {tool.name} {self.empty(tool)}
                hints rbd/{image}@base
                {backup}
                rm -rf {self.based(tool)}
                mv $WORK/out/{tool.name} {self.based(tool)}
            """)

    def full(self, image):
        """Backups of the whole image."""
        return [self.make(tool, image, "", f"store {tool.name} {self.empty(tool)}") for tool in self.tools]

    def increment(self, image):
        """Backups of what has changed since `base`."""
        return [self.make(tool, image, tool.since.format(image=image), self.from_base(tool, image))
                for tool in self.tools]

    def from_base(self, tool, image):
        """What must be done before something that needs the backup of `base`."""
        return f"store {tool.name} {self.based(tool)}; {tool.find.format(image=image, snapshot='base')}"

    def make(self, tool, image, since, before):
        """A backup, with what `since` adds."""
        snapshot = f"rbd/{image}@peer"
        hints = ("--from-snap base " if since else "") + snapshot
        backup = tool.backup.format(image=image, snapshot="peer", since=since)
        restored = "$WORK/out/restored"
        restore = f"{tool.find}; {tool.restore}".format(image=image, snapshot="peer", scheme="file", target=restored)
        return self.contender(
            tool.name, f"rbd snap create --no-progress {snapshot} && hints {hints} && {backup} && sync -f $WORK/out",
            before=before, check=f"{restore} && qemu-img compare -q -f raw -F raw {restored} rbd:{snapshot}")

    def backed_up(self, image):
        """Backups, as `base`, of what the image is now."""
        snapshot = f"rbd/{image}@base"
        self.bench.sh(f"rbd snap rm --no-progress {snapshot} 2>/dev/null || true; rbd snap create --no-progress {snapshot}")
        self.base(image)

    def restores(self, image, target):
        """Restores of `base`, to an image that is not there."""
        return [
            self.contender(tool.name, tool.restore.format(image=image, snapshot="base", scheme="rbd", target=target),
                           before=self.from_base(tool, image) + "; cold")
            for tool in self.tools
        ]

    def verifies(self, image):
        """Verification of `base`."""
        return [
            self.contender(tool.verifier, tool.verify.format(image=image, snapshot="base"),
                           before=self.from_base(tool, image) + "; cold")
            for tool in self.tools
        ]
