#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of docs/platforms.md: what the lab's tests have last shown on each machine and release.

    python3 tests/platforms.py

`lab.py test` keeps in its cache what became of each test, and the versions of what the dom0 has.  What it has run
nothing newer of, the table keeps: so a machine with an empty cache adds what it has seen.
"""

import json
import pathlib
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests/lab"))

import arch  # noqa: E402
import image  # noqa: E402
import release  # noqa: E402
import suite  # noqa: E402

DOCUMENT = REPOSITORY / "docs/platforms.md"
BEGIN, END = "<!-- written by tests/platforms.py -->\n", "<!-- until here -->\n"
PLATFORMS = {  # heads of columns, by the name of the machine
    image.machine_name(machine, debian): f"{machine.debian}, {debian.name}"
    for machine in arch.ARCHITECTURES.values()
    for debian in release.RELEASES.values()
}
FEATURES = {  # words of which one is in a test's name: it belongs to the first that fits
    "a VM of type PVH": ("pvh",),
    "Podman": ("podman",),
    "Docker": ("docker",),
    "pods": ("test_xen_pods",),
    "containerd, ctr": ("containerd", "_ctr_", "[ctr-", "test_xen_engines"),
    "life: create to delete, hooks, kill, pause, update, how a VM ends": ("test_xen_life",),
    "standard streams and terminals": ("test_xen_streams", "test_xen_consoles"),
    "exec": ("test_xen_exec",),
    "config.json: users, mounts, capabilities, limits, seccomp": ("test_xen_config",),
    "rootfs by 9p, block device and ramdisk": ("test_xen_rootfs",),
    "files as under runc": ("test_xen_files",),
    "programs on served files": ("test_xen_apps",),
    "hostile guests": ("test_xen_hostile",),
    "memory, processors, devices, kernels of their own": ("test_xen_machine",),
    "network": ("test_xen_network",),
    "errors": ("test_xen_errors",),
}


def results_of(platform):
    """{test: outcome}, of the tests that there are still."""
    path = suite.results_file(platform)
    texts = {file.name: file.read_text() for file in REPOSITORY.glob("tests/test_xen_*.py")}
    found = json.loads(path.read_text()) if path.exists() else {}
    return {
        test: outcome
        for test, (outcome, _) in found.items()
        if f"def {test.partition('[')[0].split('::')[-1]}(" in texts.get(test.partition("::")[0], "")
    }


def feature_of(test):
    return next(feature for feature, words in FEATURES.items() if any(word in test for word in words))


def versions_of(platform):
    """{what: version} of the dom0."""
    path = suite.versions_file(platform)
    return json.loads(path.read_text()) if path.exists() else {}


def cell(outcomes):
    counts = [(outcomes.count(outcome), outcome) for outcome in ("passed", "failed", "skipped")]
    return ", ".join(f"{count} {outcome}" for count, outcome in counts if count) or "–"


def tests_in(cell):
    """Of how many tests a cell tells."""
    return sum(int(word) for word in cell.split() if word.isdigit())


def newest(outcomes, before):
    """The cell of these outcomes, or the one that the document has: that a part of its tests has passed again says
    nothing of the others."""
    return cell(outcomes) if "failed" in outcomes or len(outcomes) >= tests_in(before) else before


def parts_of(document):
    """({(what, head): version}, {(feature, head): cell}) of the table in it; Podman, say, has a row in both."""
    lines = document.partition(BEGIN)[2].partition(END)[0].split("\n")
    rows = [[word.strip() for word in line[1:-1].split("|")] for line in lines if line]
    parts, part = ({}, {}), 0
    for first, *words in rows[2:]:
        part = 1 if first == next(iter(FEATURES)) else part
        parts[part].update({(first, head): word for head, word in zip(rows[0][1:], words)})
    return parts


def table(document):
    """In Markdown: a column for each platform that has results here, or has one in the document."""
    (old_versions, old_cells), results = parts_of(document), {name: results_of(name) for name in PLATFORMS}
    shown = [name for name, head in PLATFORMS.items() if results[name] or head in {head for _, head in old_versions}]
    heads, versions = [PLATFORMS[name] for name in shown], [versions_of(name) for name in shown]
    rows = [["", *heads], ["---"] * (len(heads) + 1)]
    for what in dict.fromkeys([what for what, _ in old_versions] + [what for found in versions for what in found]):
        cells = [found.get(what) or old_versions.get((what, head), "–") for found, head in zip(versions, heads)]
        rows.append([what, *cells])
    for feature in FEATURES:
        of_it = [[o for test, o in results[name].items() if feature_of(test) == feature] for name in shown]
        rows.append([feature, *(newest(o, old_cells.get((feature, head), "–")) for o, head in zip(of_it, heads))])
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def main():
    document = DOCUMENT.read_text()
    before, _, rest = document.partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + table(document) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
