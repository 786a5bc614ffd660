# SPDX-License-Identifier: Apache-2.0
"""Whatever fails, and whoever is killed: one sentence says so, and nothing of the container is left in dom0.

Each test has the first call of a kind fail, then the second, and so on, until a life goes by without one.
"""

import itertools
import pathlib
import socket

import pytest
from conftest import wait_until
from fake.dom0 import config


def try_each(dom0, arm, life, step=1):
    """Calls life() with the first call failing, then the second, or those with a step between: arm(nth) sees to it.
    Each must leave dom0 empty."""
    wrong = []
    for nth in itertools.count(1, step):
        try:
            life(lambda nth=nth: arm(nth))
            dom0.forget()
            dom0.settle()
            left = dom0.left()
            assert not left, left
        except AssertionError as error:
            wrong.append(f"{nth}: " + str(error).partition("\nassert")[0][:500])
            dom0.clean()
        dom0.release()
        if dom0.spared or len(wrong) == 10:  # what one has left, a test's own links say, may be in the way of all
            break
    assert not wrong, "\n".join([f"{len(wrong)} of {nth} calls", *wrong])


def is_sentence(result, container):
    """A command has succeeded, or failed with one sentence, on standard error and in the log."""
    text = result.stderr + container.log_text()
    assert "internal error" not in text and "Traceback" not in text, text
    if result.returncode == 0:
        assert result.stderr == "", result
    else:
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result
        assert result.stderr.startswith("runX: "), result
        assert "level=error" in container.log_text(), container.log_text()
    return True


def create_or_fail(container):
    """Creates it and removes it again; or it must say why it is not there."""
    dom0, result = container.dom0, container.create()
    dom0.forget()
    assert is_sentence(result, container)
    if result.returncode == 0:
        assert container.runx("delete", "--force").returncode == 0, container.log_text()
    else:
        assert not container.pid_file.exists()
    return container


def place(rootfs):
    return {"annotations": {"org.runx.rootfs": rootfs}}


@pytest.mark.parametrize("rootfs, how", [("ramdisk", "EIO"), ("9p", "close")])
def test_a_create_that_xenstore_fails_leaves_nothing(dom0, rootfs, how):
    def life(arm):
        container = dom0.container(**place(rootfs))
        arm()
        return create_or_fail(container)

    try_each(dom0, lambda nth: dom0.fail("xenstore", nth, how), life, 1 if how == "EIO" else 3)


def test_a_create_whose_vm_is_destroyed_before_its_devices_are_there_leaves_nothing(dom0):
    def life(arm):
        container = dom0.container(**place("9p"))
        arm()
        return create_or_fail(container)

    try_each(dom0, lambda nth: dom0.fail("xenstore", nth, "destroy", match="device/"), life, 5)


def test_a_conflict_in_xenstore_is_tried_again_but_not_for_ever(dom0):
    for count, created in ((1, True), (99, True), (100, False)):
        container = dom0.container()
        for nth in range(1, count + 1):
            dom0.fail("xenstore", nth, "EAGAIN", match="transaction_end")
        result = container.create()
        dom0.forget()
        assert is_sentence(result, container)
        assert (count, result.returncode == 0) == (count, created)
        assert created or "EAGAIN" in result.stderr
        container.runx("delete", "--force")


@pytest.mark.parametrize("rootfs, code", [("ramdisk", "EPERM"), ("9p", "EIO")])
def test_a_create_whose_mounts_and_namespaces_fail_leaves_nothing(dom0, rootfs, code):
    def life(arm):
        container = dom0.container()
        (container.bundle / "volume").mkdir()
        volume = {"destination": "/volume", "type": "bind", "source": "volume", "options": ["rbind", "ro"]}
        container.write(config(**place(rootfs), mounts=[volume]))
        arm()
        return create_or_fail(container)

    try_each(dom0, lambda nth: dom0.fail_system_call(nth, code), life)


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done"])
def test_a_create_whose_xl_fails_leaves_nothing(dom0, after):
    def life(arm):
        container = dom0.container()
        arm()
        create_or_fail(container)
        assert dom0.spared or "xl create failed: no luck\n" in container.log_text()
        return container

    try_each(dom0, lambda nth: dom0.fail("xl", nth, "no luck", after), life)


def test_a_create_whose_xl_hangs_ends_and_leaves_nothing(dom0, quick_xl):
    def life(arm):
        container = dom0.container()
        arm()
        create_or_fail(container)
        assert dom0.spared or "xl has not ended in 0.1 s" in container.log_text()
        return container

    try_each(dom0, lambda nth: dom0.fail("xl", nth, "hang"), life)


@pytest.fixture
def quick_xl(dom0):
    dom0.constants["XL_TIME_LIMIT"] = 0.1


@pytest.mark.parametrize("what, after", [("xenstore", True), ("xl", False), ("xl", True)])
def test_a_create_whose_monitor_is_killed_leaves_nothing(dom0, what, after):
    def life(arm):
        container = dom0.container()
        arm()
        return create_or_fail(container)

    try_each(dom0, lambda nth: dom0.fail(what, nth, "kill", after), life)


def test_a_create_whose_processes_are_killed_leaves_nothing_after_delete(dom0):
    """create, holder or monitor, at each of the system calls of either."""

    def life(arm):
        container = dom0.container()
        arm()
        assert container.create().returncode in (0, 1, -9)
        dom0.forget()
        assert container.runx("delete", "--force").returncode == 0, container.log_text()
        return container

    try_each(dom0, lambda nth: dom0.fail_system_call(nth, "kill"), life)


def test_a_create_without_xenstored_leaves_nothing(dom0):
    container = dom0.container()
    dom0.constants["XENSTORED_SOCKET"] = "/no/such"
    refused = container.create()
    assert refused.returncode == 1 and "xenstored" in refused.stderr, refused
    assert not (container.root / container.id).exists()


def test_who_removes_what_a_killed_create_has_begun_waits_for_its_monitor(dom0):
    """Which could write its state into the folder of the next container of that id."""
    container = dom0.container()
    with socket.socket(socket.AF_UNIX) as xenstored, socket.socket(socket.AF_UNIX) as first:
        path = str(container.bundle / "xenstored")  # takes nobody more
        xenstored.bind(path)
        xenstored.listen(0)
        first.connect(path)
        dom0.constants["XENSTORED_SOCKET"] = path
        create = container.start_runx("create", "--bundle", str(container.bundle))
        wait_until(lambda: len(dom0.processes()) == 2, "the monitor")
        create.signal(9)
        assert create.wait().returncode == -9
        folder = str(container.root / container.id)
        assert dom0.run(program=["flock", "--nonblock", folder, "true"]).returncode == 1
    assert container.runx("delete", "--force").returncode == 0
    dom0.settle()


def test_a_create_that_is_killed_while_the_vm_is_built_leaves_no_cgroup(dom0):
    """The holder is in it, too, and ends after the monitor has removed it."""
    container = dom0.container()
    container.write(config(linux={"cgroupsPath": "/killed"}))
    dom0.fail("xl", 1, "slow", match="create")
    create = container.start_runx("create", "--bundle", str(container.bundle))
    dom0.ask("await_calls", "xl", "create")
    create.signal(9)
    assert create.wait().returncode == -9
    dom0.ask("release")
    dom0.settle()
    assert (dom0.left(), container.log_text()) == ({}, "")


def test_the_ramdisk_of_a_monitor_that_was_killed_before_it_had_no_name_is_removed(dom0):
    container = dom0.container().created()
    ramdisk = pathlib.Path(f"{dom0.inside}/var/tmp/{container.stored()['name']}")
    ramdisk.touch()
    assert container.runx("delete").returncode == 0
    assert not ramdisk.exists()


def test_a_create_for_which_there_is_no_room_leaves_nothing(dom0):
    """The root has room for one file, then for two, and so on."""
    wrong, created = [], False
    for files in itertools.count(2):
        container = dom0.container(**place("9p"))
        root = str(container.root)
        assert dom0.run(program=["mkdir", root]).returncode == 0
        mount = ["busybox", "mount", "-t", "tmpfs", "-o", f"nr_inodes={files}", "full", root]
        assert dom0.run(program=mount).returncode == 0
        try:
            created = container.create().returncode == 0
            if created:
                assert container.runx("delete", "--force").returncode == 0
            elif "internal error" in container.log_text() or "No space left" not in container.log_text():
                wrong.append((files, container.log_text()))
            dom0.settle()
        finally:
            assert dom0.run(program=["busybox", "umount", root]).returncode == 0
        if dom0.left() or created:
            break
    assert (wrong, dom0.left(), files > 8) == ([], {}, True)


# ---- from start to delete


def live(dom0, arm, *changes):
    """A life in which something may fail once it is created.  The engine deletes it in any case."""
    container = dom0.container("out:hello", "err:oops", "exit:3").created()
    arm()
    result = container.runx("start")
    if result.returncode >= 0:
        assert is_sentence(result, container)
    if result.returncode == 0:
        assert container.wait() in (3, 137, 255)
    dom0.forget()
    assert container.status() in (["stopped"] if result.returncode == 0 else ["created", "stopped", "running"])
    assert container.runx("delete", "--force").returncode == 0, container.log_text()
    assert "internal error" not in container.log_text(), container.log_text()
    return container


@pytest.mark.parametrize("how", ["EIO", "close", "kill"])
def test_a_life_that_xenstore_fails_ends_and_leaves_nothing(dom0, how):
    try_each(dom0, lambda nth: dom0.fail("xenstore", nth, how), lambda arm: live(dom0, arm), 3 if how == "close" else 1)


@pytest.mark.parametrize("how", ["no luck", "kill"])
@pytest.mark.parametrize("after", [False, True], ids=["not done", "done"])
def test_a_life_whose_xl_fails_ends_and_leaves_nothing(dom0, how, after):
    try_each(dom0, lambda nth: dom0.fail("xl", nth, how, after), lambda arm: live(dom0, arm))


# ---- delete


@pytest.mark.parametrize("state", ["created", "stopped", "abandoned"])
@pytest.mark.parametrize("what, how", [("xenstore", "EIO"), ("xenstore", "kill"), ("xl", "no luck"), ("xl", "kill")])
def test_a_delete_that_fails_can_be_done_again(dom0, state, what, how):
    """abandoned: its monitor has been killed."""

    def life(arm):
        container = dom0.container("exit:3").created()
        if state == "stopped":
            assert container.runx("start").returncode == 0
            container.wait()
        elif state == "abandoned":
            dom0.signal(container.stored()["monitor"][0], 9)
            assert container.wait() == 137
        arm()
        result = container.runx("delete")
        dom0.forget()
        assert result.returncode < 0 or is_sentence(result, container)
        if result.returncode:
            result = container.runx("delete", "--force")
            assert (result.returncode, result.stderr) == (0, "")
        elif "level=warning msg=cannot " in container.log_text() and list(dom0.left()) == ["more nodes"]:
            dom0.ask("reset")  # a node that could not be removed is told, and keeps nobody from going on
        return container

    try_each(dom0, lambda nth: dom0.fail(what, nth, how), life)
