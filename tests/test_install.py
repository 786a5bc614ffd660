# SPDX-License-Identifier: Apache-2.0
"""What install.sh puts on a dom0 beside the module: the command, its manual page and bash's completion of it."""

import os
import py_compile
import re
import shlex
import shutil

import pytest
from conftest import REPOSITORY, call

import runx

MANUAL, COMPLETION = (REPOSITORY / "docs" / name for name in ("runX.8", "runX.bash-completion"))


def long_options(command):
    """Of a command, or with "" those before it."""
    sets = runx.COMMANDS[command][1:3] if command else (runx.GLOBAL_FLAGS, runx.GLOBAL_VALUES)
    return {f"--{name}" for names in sets for name in names}


# ---- the manual page


def manual_sections():
    """{heading: text} of the page, its escapes undone.  Sections of commands are headed by these."""
    text = MANUAL.read_text().replace(r"\-", "-")
    parts = re.split(r"^\.S[HS] (.*)\n", re.sub(r"\\f.|\\&", "", text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def manual_options():
    """{command: options}, with "" for those before it."""
    sections, found = manual_sections(), {}
    headings = list(sections)
    for heading in headings[headings.index("COMMANDS") + 1 : headings.index("ANNOTATIONS AND NETWORKS")]:
        for command in heading.split(", "):
            assert command not in found
            found[command] = sections[heading]
    found["run"] += found["create"]  # as it says
    found[""] = sections["OPTIONS"]
    return {command: set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", text)) for command, text in found.items()}


def test_the_manual_has_every_command_and_option_and_no_other():
    found = manual_options()
    assert found.keys() - {""} == runx.COMMANDS.keys()
    for command in found.keys():
        known = long_options(command)
        known |= {f"-{letter}" for letter, name in runx.SHORT.items() if f"--{name}" in known}
        known |= {"-f"} if "--format" in known else set()
        assert found[command] == known, command


def test_the_manual_names_the_places_that_runx_uses():
    files = manual_sections()["FILES"]
    assert all(path in files for path in (runx.HOST_CONFIG, runx.DEFAULT_ROOT, "/etc/runX/xl", "/etc/cni/net.d"))


# ---- completion


def completed(*lines):
    """For each command line, a list of words, what bash offers for the last one; "FILES": names of files."""
    script = [
        f"set -eu; source {shlex.quote(str(COMPLETION))}",
        "compopt() { COMPREPLY+=(FILES); }",
        "runX() { case $* in 'list --quiet') echo c1 c2 d ;; '--root /r list --quiet') echo r1 ;; *) false ;; esac; }",
    ]
    for words in lines:
        script.append(f"COMP_WORDS=(runX {shlex.join(words)}) COMP_CWORD={len(words)} COMPREPLY=()")
        script.append(f'_runX runX {shlex.quote(words[-1])} x; echo "${{COMPREPLY[*]}}"')
    result = call("bash", "--norc", "-c", "\n".join(script))
    assert (result.returncode, result.stderr) == (0, b""), result
    return [line.split() for line in result.stdout.decode().split("\n")[:-1]]


def test_bash_completes_every_command_and_option_and_no_other():
    assert set(*completed([""])) == runx.COMMANDS.keys()
    commands = ["", *runx.COMMANDS]
    for command, offered in zip(commands, completed(*([*command.split(), "-"] for command in commands))):
        assert set(offered) == long_options(command), command


def test_bash_knows_which_options_have_a_value():
    cases = [(command, option) for command in ("", *runx.COMMANDS) for option in sorted(long_options(command))]
    lines = [[*command.split(), option, "-"] for command, option in cases]
    for (command, option), offered in zip(cases, completed(*lines)):
        values = runx.COMMANDS[command][2] if command else runx.GLOBAL_VALUES - {"rootless"}
        assert bool(long_options(command) & set(offered)) == (option[2:] not in values), (command, option)


@pytest.mark.parametrize(
    "line, offered",
    [
        ("sta", "start state"),
        ("start ''", "c1 c2 d"),
        ("delete --force c", "c1 c2"),
        ("--root /r state ''", "r1"),
        ("--root = /r --debug state ''", "r1"),  # bash takes --root=/r apart
        ("kill c1 T", "TERM"),
        ("kill --signal K", "KILL"),
        ("list --format ''", "table json"),
        ("list --format = j", "json"),
        ("ps -f ''", "table json"),
        ("delete -f ''", "c1 c2 d"),
        ("--log-format =", "text json"),
        ("create --bundle ''", "FILES"),
        ("pack-initrd ''", "FILES"),
        ("create ''", ""),
        ("state c1 ''", ""),
    ],
)
def test_bash_completes(line, offered):
    assert completed(shlex.split(line)) == [offered.split()]


# ---- install.sh


# whether there are a kernel and a ramdisk of this source takes longer to find out than all else
BOOT_FILES = ("--kernel", str(MANUAL), "--initrd", str(MANUAL))


def install(folder, *options, prefix="/usr", path=runx.PATH, script=REPOSITORY / "install.sh", cwd="/", **env):
    env = {"PATH": path, "DESTDIR": str(folder), "PREFIX": prefix, **env}
    result = call("sh", str(script), *(options or BOOT_FILES), env=env, cwd=cwd)
    assert result.returncode == 0, result
    return result.stderr.decode()


def test_install_puts_everything_below_destdir_and_uninstall_takes_it_away(tmp_path):
    boot_file, folder = tmp_path / "file", tmp_path / "image"
    boot_file.write_text("kernel")
    install(folder, "--kernel", str(boot_file), "--initrd", str(boot_file), prefix="/opt/x")
    modes = {
        str(path.relative_to(folder / "opt/x")): path.stat().st_mode & 0o777
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert modes == {
        "sbin/runX": 0o755, "lib/runX/runx.py": 0o644, "lib/runX/kernel": 0o644, "lib/runX/initrd": 0o644,
        "share/man/man8/runX.8": 0o644, "share/bash-completion/completions/runX": 0o644,
    }  # fmt: skip
    share = folder / "opt/x/share"
    assert (share / "man/man8/runX.8").read_bytes() == MANUAL.read_bytes()
    assert (share / "bash-completion/completions/runX").read_bytes() == COMPLETION.read_bytes()
    install(folder, "--uninstall", prefix="/opt/x")
    assert [path for path in folder.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_install_changes_nothing_where_a_file_that_it_is_given_is_not_there(tmp_path, what):
    """A new module beside the kernel and ramdisk of an older one may not understand them."""
    env, missing = {"PATH": runx.PATH, "DESTDIR": str(tmp_path / "image")}, tmp_path / "missing"
    result = call("sh", str(REPOSITORY / "install.sh"), f"--{what}", str(missing), env=env, cwd="/")
    error = f"install.sh: cannot install the {what}: {missing} is not a file\n"
    assert (result.returncode, result.stderr.decode()) == (1, error)
    assert not (tmp_path / "image").exists()


def test_install_replaces_and_leaves_nothing_where_python_is_too_old(tmp_path):
    old, lib = tmp_path / "bin/python3", tmp_path / "image/usr/lib/runX"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\n[ $1 != -V ] || exec echo Python 3.6.8\nexit 1\n")
    old.chmod(0o755)
    lib.mkdir(parents=True)
    (lib / "runx.py").write_text("the one of before")
    env = {"PATH": f"{old.parent}:{runx.PATH}", "DESTDIR": str(tmp_path / "image")}
    result = call("sh", str(REPOSITORY / "install.sh"), *BOOT_FILES, env=env, cwd="/")
    error = "install.sh: Python 3.6.8 cannot compile runX, and nothing was replaced\n"
    assert (result.returncode, result.stderr.decode()) == (1, error)
    assert [path.name for path in lib.iterdir()] == ["runx.py"]
    assert (lib / "runx.py").read_text() == "the one of before"


@pytest.mark.skipif(not shutil.which("busybox"), reason="there is no busybox here")
def test_install_needs_no_tools_but_those_that_every_busybox_has(tmp_path):
    """Debian's and oe-core's have no install(1)."""
    (tmp_path / "bin").mkdir()
    for name in ("cat", "chmod", "cp", "dirname", "mkdir", "mv", "rm", "sh"):
        (tmp_path / "bin" / name).symlink_to(shutil.which("busybox"))
    install(tmp_path / "image", path=str(tmp_path / "bin"))
    assert (tmp_path / "image/usr/sbin/runX").stat().st_mode & 0o777 == 0o755


def test_what_is_installed_is_for_everybody_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        install(tmp_path / "a folder", prefix="/opt/x y")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "a folder").rglob("*") if path.is_dir()}
    assert modes == {0o755}
    (compiled,) = (tmp_path / "a folder/opt/x y/lib/runX/__pycache__").iterdir()
    assert compiled.stat().st_mode & 0o777 == 0o644


def test_install_finds_its_files_also_where_cdpath_leads_elsewhere(tmp_path):
    (tmp_path / REPOSITORY.name).mkdir()
    script = f"{REPOSITORY.name}/install.sh"
    install(tmp_path / "image", script=script, cwd=str(REPOSITORY.parent), CDPATH=str(tmp_path))
    assert (tmp_path / "image/usr/sbin/runX").exists()


def test_install_tells_of_a_kernel_and_ramdisk_that_are_not_of_this_source(tmp_path):
    """A module and a ramdisk of two sources may not understand each other."""
    boot_file, nothing_built = tmp_path / "file", {"XDG_CACHE_HOME": str(tmp_path)}
    boot_file.write_text("old")
    told = install(tmp_path / "image", "--kernel", str(boot_file), **nothing_built)
    assert told.splitlines() == [
        "install.sh: there is no initrd yet: build it with initrd/build.sh and call install.sh again, or give one with "
        "--initrd FILE"
    ]
    told = install(tmp_path / "image", "--initrd", str(boot_file), **nothing_built)
    assert told.splitlines() == [
        "install.sh: the kernel stays the one of before: build that of this source with kernel/build.sh and call "
        "install.sh again, or give one with --kernel FILE"
    ]
    assert install(tmp_path / "image", "--initrd", str(boot_file), "--kernel", str(boot_file), **nothing_built) == ""


def test_what_is_installed_runs_as_it_was_compiled_without_a_look_at_the_source(tmp_path):
    install("", prefix=str(tmp_path))
    (tmp_path / "lib/runX/runx.py").write_text("not a module")
    result = call(str(tmp_path / "sbin/runX"), "--version")
    assert (result.returncode, result.stdout.split(b"\n")[0]) == (0, f"runX version {runx.VERSION}".encode())


def test_what_was_compiled_from_an_older_module_does_not_stay(tmp_path):
    (tmp_path / "lib/runX/__pycache__").mkdir(parents=True)
    older = tmp_path / "lib/runX/__pycache__/runx.cpython-30.pyc"
    older.write_text("of another Python")
    install("", prefix=str(tmp_path))
    assert not older.exists()


@pytest.mark.parametrize("tools", ["cp mv rm python3", "cp mv rm"])
def test_runx_can_be_called_all_the_time_while_it_is_installed_anew(tmp_path, tools):
    """Each tool calls it before and after what it does, and `cp` when it has removed what it replaces; without python3
    in the PATH, nothing is compiled."""
    install("", prefix=str(tmp_path))
    module, command, log = tmp_path / "lib/runX/runx.py", tmp_path / "sbin/runX", tmp_path / "log"
    # of another size: by size and second Python tells whether what it has compiled by itself is of this source
    module.write_text(module.read_text().replace(f'VERSION = "{runx.VERSION}"', 'VERSION = "old"'))
    (compiled,) = (tmp_path / "lib/runX/__pycache__").iterdir()
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(module), cfile=str(compiled), doraise=True, invalidation_mode=unchecked)
    look = f"{command} --version >>{log} 2>&1 || echo failed >>{log}"
    before = {"cp": 'for last; do :; done; [ -d "$last" ] || /bin/rm -f "$last"'}
    (tmp_path / "bin").mkdir()
    for name in (*tools.split(), "sh", "cat", "chmod", "dirname", "mkdir"):
        tool, real = tmp_path / "bin" / name, shutil.which(name, path=runx.PATH)
        if name in tools.split():
            lines = ["#!/bin/sh", look, before.get(name, ":"), look, f'{real} "$@" || exit', look]
            tool.write_text("\n".join(lines) + "\n")
            tool.chmod(0o755)
        else:
            tool.symlink_to(real)
    install("", prefix=str(tmp_path), path=str(tmp_path / "bin"))
    seen = re.findall("runX version (.*)|(?:.*Error.*|failed)", log.read_text())
    assert len(seen) > 10 and seen == sorted(seen, reverse=True) and {*seen} == {"old", runx.VERSION}, log.read_text()
    assert call(str(command), "--version").stdout.split()[2] == runx.VERSION.encode()
