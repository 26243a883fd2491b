"""The figures as a table, as JSON and as a picture."""

import json
import os
import statistics

OURS = "rbd2qcow2"
FLOOR = "floor: read, write"


def spread(values, form):
    """A median, and between what it lies; nothing of nothing."""
    if not values:
        return ""
    return f"{format(statistics.median(values), form)} ({format(min(values), form)}-{format(max(values), form)})"


def ratios(mine, others, what="wall"):
    """How one contender compares with another, round by round."""
    return [a[what] / b[what] for a, b in zip(mine, others) if b[what] > 0]


def size(count):
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def rows(workload):
    runs = workload["runs"]
    floor = runs.get(FLOOR) or []
    ours = next((found for name, found in runs.items() if name.startswith(OURS) and found), [])
    for name, found in runs.items():
        if not found:
            continue
        seconds = [run["figure"] for run in found if run["figure"] is not None]
        items = workload["items"].get(name)
        rate = ""
        if items:
            times = seconds or [run["wall"] for run in found]
            # It tells of milliseconds.
            rate = f"{items / max(statistics.median(times), 0.001):,.0f}/s"
        yield [
            name,
            spread([run["wall"] for run in found], ".2f"),
            spread(ratios(found, floor), ".2f"),
            spread(ratios(ours, found), ".2f") if found is not ours else "",
            f"{statistics.median(run['cpu'] for run in found):.2f}",
            f"{max(run['memory'] for run in found) >> 20}",
            size(statistics.median(run["read"] for run in found)),
            size(statistics.median(run["stored"] for run in found)),
            f"{statistics.median(seconds):.3f}" if seconds else "",
            rate,
        ]


HEAD = [
    "", "wall s", "x floor", "ours / this", "CPU s", "peak MiB", "read", "stored", "diff s", "items",
]


def table(results):
    """Markdown."""
    lines = ["# Side by side", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += [f"- rounds: {results['rounds']}; medians, in brackets the least and the most", ""]
    lines += goals_table(results)
    for workload in results["workloads"]:
        lines += [f"## {workload['title']}", ""]
        body = list(rows(workload))
        # Columns that nobody has anything in.
        used = [i for i in range(len(HEAD)) if i == 0 or any(row[i] for row in body)]
        lines.append("| " + " | ".join(HEAD[i] for i in used) + " |")
        lines.append("|---" * len(used) + "|")
        lines += ["| " + " | ".join(row[i] for i in used) + " |" for row in body]
        lines += [f"| {name} | cannot: {why} |" + " |" * (len(used) - 2) for name, why in workload["cannot"].items()]
        lines.append("")
    return "\n".join(lines)


def against(workload, one, other, what="wall"):
    """The ratios of two contenders of a workload; none where one of them has no runs."""
    runs = workload["runs"]
    return ratios(runs.get(one) or [], runs.get(other) or [], what)


def goals(results):
    """What the project has set itself: (goal, ratios or values, limit, whether less is better)."""
    found = {workload["key"]: workload for workload in results["workloads"]}
    if full := found.get("full"):
        yield "full, random data: wall / `qemu-img convert`", against(full, OURS, "qemu-img convert"), 1.0, True
        yield "full, random data: wall / the floor", against(full, OURS, FLOOR), 1.25, True
        yield "full, random data: CPU / reading alone", against(full, OURS, "floor: read", "cpu"), 1.25, True
    if debian := found.get("debian"):
        theirs = "qemu-img convert -c zstd"
        yield "Debian, zstd: times as fast as `qemu-img convert -c`", against(debian, theirs, OURS + " zstd"), 2.0, False
        yield "Debian, zstd: file / theirs", against(debian, OURS + " zstd", theirs, "stored"), 1.0, True
    if scattered := found.get("scattered"):
        yield "scattered: wall / `rbd export-diff`", against(scattered, OURS, "rbd export-diff"), 0.25, True
        stored = [run["stored"] / (4096 * 4096) for run in scattered["runs"].get(OURS) or []]
        yield "scattered: stored / changed bytes", stored, 2.0, True
    if sparse := found.get("diff-sparse"):
        yield "diff of 1 TiB, 256 objects: seconds", [r["figure"] for r in sparse["runs"].get(OURS) or []], 0.5, True
    if objects := found.get("diff-full"):
        pairs = zip(objects["runs"].get("rbd diff") or [], objects["runs"].get(OURS) or [])
        yield "diff of 32,768 objects: times `rbd diff`'s rate", [a["wall"] / b["figure"] for a, b in pairs], 2.5, False
    if fifty := found.get("fifty"):
        yield "50 unchanged images: times the rate of one at a time with qemu-nbd", \
            against(fifty, OURS + " -j 1 qemu-nbd", OURS), 10.0, False
    if restore := found.get("restore"):
        yield "restore: wall / `qemu-img convert -n -W -m 16`", against(restore, OURS, "qemu-img convert -n"), 1.0, True
    # What another program takes is not the limit's.
    own = [run["memory"] / (1 << 20) for workload in results["workloads"] for name, runs in workload["runs"].items()
           if name.startswith(OURS) and "qemu-nbd" not in name for run in runs]
    yield "peak memory of any of its runs, MiB", [max(own)] if own else [], 256, True


def goals_table(results):
    """Markdown."""
    lines = ["## Goals", "", "| | measured | goal | |", "|---|---|---|---|"]
    for goal, values, limit, less in goals(results):
        if values:
            value = statistics.median(values)
            holds = "holds" if (value <= limit if less else value >= limit) else "**does not hold**"
            lines.append(f"| {goal} | {spread(values, '.2f')} | {'<=' if less else '>='} {limit:g} | {holds} |")
    return lines + [""]


COLOURS = {"floor": "#b8c0c8", OURS: "#2563a8", "": "#d9a441"}
# The picture is for people who have a minute: not all of the workloads, nor all that was measured of them.
SHOWN = {
    "full": "", "debian": "zstd", "scattered": "", "fifty": "", "restore": "",
}
HIDDEN = "floor: read", "--diff fast"
ROW, LEFT, WIDTH = 18, 210, 760


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;")


def picture(results):
    """Bars of the medians of the wall time, with lines from the least to the most, in SVG."""
    parts, y = [], 24
    for workload in results["workloads"]:
        word = SHOWN.get(workload["key"])
        if word is None:
            continue
        runs = {
            name: [run["wall"] for run in found] for name, found in workload["runs"].items()
            if found and word in name and name not in HIDDEN
        }
        if not runs:
            continue
        most = max(max(walls) for walls in runs.values())
        scale = (WIDTH - LEFT - 90) / most
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(workload["title"])}</text>')
        y += 8
        for name, walls in runs.items():
            middle = statistics.median(walls)
            colour = next(value for key, value in COLOURS.items() if name.startswith(key))
            y += ROW
            parts.append(f'<text x="{LEFT - 6}" y="{y - 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(
                f'<rect x="{LEFT}" y="{y - ROW + 4}" width="{middle * scale:.1f}" height="{ROW - 5}" fill="{colour}"/>')
            parts.append(
                f'<line x1="{LEFT + min(walls) * scale:.1f}" x2="{LEFT + max(walls) * scale:.1f}" '
                f'y1="{y - ROW / 2 + 1}" y2="{y - ROW / 2 + 1}" stroke="#333" stroke-width="2"/>')
            parts.append(f'<text x="{LEFT + max(walls) * scale + 6:.1f}" y="{y - 4}">{middle:.2f} s</text>')
        y += 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'font-family="sans-serif" font-size="12" fill="#222">'
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def write(results, directory):
    """compare.json, compare.md and compare.svg."""
    os.makedirs(directory, exist_ok=True)
    texts = {"json": json.dumps(results, indent=1) + "\n", "md": table(results), "svg": picture(results)}
    for kind, text in texts.items():
        with open(f"{directory}/compare.{kind}", "w", encoding="utf-8") as file:
            file.write(text)
