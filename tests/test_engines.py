# SPDX-License-Identifier: Apache-2.0
"""What real engines have asked of runc (tests/data/engines.jsonl.xz, one config.json a line), and what runX answers."""

import json
import lzma
import os
import pathlib

import pytest
from spec import check_guest_words

import runx

DATA = pathlib.Path(__file__).with_name("data")
CONFIGS = dict(map(json.loads, lzma.decompress((DATA / "engines.jsonl.xz").read_bytes()).splitlines()))


def expectations():
    """{name: answer} of engines.txt: a line for each config, "name: answer"."""
    lines = (DATA / "engines.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def answer(spec, folder):
    """What create says of it: "yes", the warnings, or the reason of the refusal."""
    (folder / "rootfs").mkdir()
    spec["root"]["path"] = "rootfs"
    (folder / "config.json").write_text(json.dumps(spec))
    try:
        config = runx.Config(str(folder))
        runx.join_pod(config, str(folder))
    except runx.Error as error:
        return f"no, {error}"
    check_guest_words(config, spec)
    return "; ".join(["yes", *config.warnings])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_runx_answers_to_an_engine(tmp_path, monkeypatch, name):
    # the host's files and namespaces are those of another time
    monkeypatch.setattr(runx.os.path, "exists", lambda path: True)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255]))
    monkeypatch.setattr(runx.os.path, "samefile", lambda *paths: False)
    monkeypatch.setattr(runx, "check_namespace", lambda kind, path: None)
    monkeypatch.setattr(runx, "is_unused", lambda kind, path: False)
    assert answer(CONFIGS[name], tmp_path) == expectations()[name]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "names ipc, uts of another" in expectations()[name]])
def test_in_a_pod_whose_sandbox_is_there_it_takes_them(tmp_path, monkeypatch, name):
    monkeypatch.setattr(runx.os.path, "exists", lambda path: True)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255]))
    monkeypatch.setattr(runx.os.path, "samefile", lambda path, other: "/ns/" in other and other != "/proc/self/ns/net")
    monkeypatch.setattr(runx, "check_namespace", lambda kind, path: None)
    monkeypatch.setattr(runx, "in_namespace", lambda path, work, kind: work())
    monkeypatch.setattr(runx.Container, "load", lambda container: vars(container).update(folder=tmp_path) or container)
    monkeypatch.setattr(runx.State, "is_sandbox", True)
    assert answer(CONFIGS[name], tmp_path).split(";")[0] == "yes"


def test_the_table_has_all_of_them():
    assert expectations().keys() == CONFIGS.keys()
