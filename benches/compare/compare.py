"""Measures rbd2qcow2 beside what is used in its place. See README.md here; `make compare` runs it."""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys

import report
from measure import Failed, Osds, run
from workloads import ALL, Bench


def measure(bench, workload, rounds, osds, checked):
    """All contenders in turn, round by round, so that a machine that drifts does so for all."""
    runs = {contender.name: [] for contender in workload.contenders}
    for number in range(rounds):
        for contender in workload.contenders:
            if contender.name not in runs:
                continue
            try:
                bench.sh(contender.before or ":")
                bench.sh("sync")
                result = run(bench.line(contender.command), osds, contender.places)
                if checked and number == 0 and contender.check:
                    bench.sh(contender.check)
                figure = None
                if contender.figure:
                    figure = json.loads(result.out.strip().splitlines()[-1])[contender.figure]
                runs[contender.name].append({**vars(result), "figure": figure, "out": ""})
                print(f"  {number + 1} {contender.name}: {result.wall:.2f} s, {result.cpu:.2f} s CPU", flush=True)
            except Failed as error:
                print(f"  {number + 1} {contender.name}: FAILED: {error}", flush=True)
                workload.cannot[contender.name] = f"failed: {str(error).splitlines()[-1]}"
                del runs[contender.name]
            try:
                bench.sh(contender.after or ":")
            except Failed:
                # What failed may have left nothing to undo.
                if contender.name in runs:
                    raise
    return runs


def machine(bench):
    """What the figures were measured on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    with open("/proc/meminfo", encoding="utf-8") as file:
        memory = int(file.readline().split()[1]) >> 20

    def first(*command):
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        return (out.stdout or out.stderr).strip().splitlines()[0]

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "processors": f"{os.cpu_count()} x {model}",
        "memory_gib": memory,
        "kernel": os.uname().release,
        "rbd2qcow2": first(bench.program, "--version"),
        "ceph": first("ceph", "--version").split("(")[0].strip(),
        "qemu": first("qemu-img", "--version"),
        "nbdcopy": first("nbdcopy", "--version"),
        "files": first("findmnt", "-n", "-o", "FSTYPE", "-T", bench.work),
    } | bench.field.found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="rbd2qcow2")
    parser.add_argument("--floor", required=True, help="the program made of floor.c")
    parser.add_argument("--python", required=True, help="directory for tools written in Python; they are installed there")
    parser.add_argument("--work", required=True, help="directory for what is backed up; 36 GiB")
    parser.add_argument("--out", required=True, help="directory for compare.md, compare.json and compare.svg")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unchecked", action="store_true", help="do not compare results with the images")
    parser.add_argument("--only", default="", help="names of contenders must hold one of these, with commas between")
    parser.add_argument("workloads", nargs="*", help="of: " + ", ".join(work.__name__ for work in ALL))
    arguments = parser.parse_args()
    chosen = [work for work in ALL if not arguments.workloads or work.__name__ in arguments.workloads]
    if len(chosen) < len(set(arguments.workloads)):
        parser.error("no such workload")
    bench = Bench(os.path.realpath(arguments.program), os.path.realpath(arguments.floor),
                  os.path.realpath(arguments.python), os.path.realpath(arguments.work),
                  [part for part in arguments.only.split(",") if part])
    osds = Osds(os.environ["CEPH_CONF"])
    results = {"machine": machine(bench), "rounds": arguments.rounds, "workloads": []}
    for work in chosen:
        workload = work(bench)
        workload.contenders = [contender for contender in workload.contenders if bench.wants(contender.name)]
        print(workload.title, flush=True)
        runs = measure(bench, workload, arguments.rounds, osds, not arguments.unchecked)
        results["workloads"].append({
            "key": workload.key, "title": workload.title, "cannot": workload.cannot, "runs": runs,
            "items": {c.name: c.items for c in workload.contenders if c.items},
        })
        # What is there is kept, should a later one fail.
        report.write(results, arguments.out)
    sys.stdout.write(report.table(results))


if __name__ == "__main__":
    # As if interrupted: what runs is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (Failed, subprocess.CalledProcessError) as failure:
        sys.exit(f"compare: {failure}")
