# SPDX-License-Identifier: Apache-2.0
"""RunX in an image of Yocto's: docs/yocto/meta-runx says what it needs, and it lives in a root file system that has
just that: busybox, xl, and those modules of Python that are in the packages that the recipe names."""

import ast
import functools
import hashlib
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import REPOSITORY, call, emptied
from fake import host
from fake.dom0 import Dom0

import runx

LAYER = REPOSITORY / "docs/yocto/meta-runx"
RECIPES = sorted((LAYER / "recipes-core/runx").glob("*.bb"))
# What is part of any interpreter: CPython's Modules/Setup.bootstrap.in and Python/, such as its config.c.
BUILT_IN = set(
    "builtins sys marshal gc _imp _ast _tokenize _warnings _string _typing _suggestions atexit faulthandler posix "
    "_signal _tracemalloc _suggestions _codecs _collections errno _io itertools _sre _thread time _types _weakref _abc "
    "_functools _locale _operator _stat _symtable pwd _sysconfig _contextvars".split()
)


# ---- what is in which package


def releases():
    """Yield (version of Python, {package: (packages that it needs, patterns of its modules)}) of each of Yocto's."""
    text = re.sub(r"\n +", " ", (REPOSITORY / "tests/data/yocto-python.txt").read_text())
    for head, body in re.findall(r"^\[(.*)\]\n((?:[^\[\n].*\n)+)", text, re.M):
        packages = {}
        for line in body.splitlines():
            package, needs, modules = line.split(": ")
            packages[package] = ([] if needs == "-" else needs.split(), modules.split())
        yield tuple(map(int, head.rpartition(" ")[2].split(".")[:2])), packages


def has(packages, package, module):
    return any(re.fullmatch(pattern.replace("*", ".*"), module) for pattern in packages[package][1])


def nearest():
    """The packages of that release whose Python is the newest that is no newer than ours."""
    found = list(releases())
    return max((each for each in found if each[0] <= sys.version_info[:2]), default=found[0])[1]


def packages_of(variable):
    """Those that the recipe of the runtime names."""
    text = next(path for path in RECIPES if path.name.startswith("runx_")).read_text()
    return re.search(rf'^{variable}:\$\{{PN\}} = "(.*?)"', text, re.M | re.S)[1].replace("\\", " ").split()


def named_packages():
    """Those of Python that the recipe of the runtime names."""
    depends = packages_of("RDEPENDS")
    assert "xen-tools-xl" in depends
    return [name[len("python3-") :] for name in depends if name.startswith("python3-")]


def with_needed(packages, names):
    """Those of that release, and all that they need."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += packages[name][0]
    return found


@functools.cache
def imported_modules():
    """The modules that runx.py imports anywhere when it runs, but the interpreter's own."""
    found = set()
    tree = ast.parse(pathlib.Path(runx.__file__).read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return sorted(found - BUILT_IN)


def test_the_recipe_names_the_packages_of_all_modules_that_runx_imports_and_no_other():
    named, needed = named_packages(), {"core"}
    for version, packages in releases():
        for module in imported_modules():
            having = [package for package in named if has(packages, package, module)]
            assert having, f"{module}, in Python {version}, is in none of the packages that the recipe names"
            if len(having) == 1:
                needed.add(having[0])
    assert set(named) == needed


def test_the_recipe_names_what_makes_the_folders_that_xl_needs():
    """Of meta-virtualization's packages, xl's has no /var/lib/xen, without whose files libxl creates no domain."""
    assert {"xen-tools-volatiles", "xen-tools-xencommons"} <= set(packages_of("RRECOMMENDS"))


def test_the_recipes_are_of_this_version_and_know_its_licence():
    assert {path.name for path in RECIPES} == {
        f"{name}_{runx.VERSION}.bb" for name in ("runx", "runx-initrd", "runx-kernel")
    }
    digest = hashlib.md5((REPOSITORY / "LICENSE").read_bytes()).hexdigest()
    for path in RECIPES:
        for found in re.findall(r"file://LICENSE;md5=(\w+)", path.read_text()):
            assert found == digest, path.name


def test_the_layer_is_for_releases_whose_packages_of_python_are_known():
    names = re.search(r'^LAYERSERIES_COMPAT_runx = "(.*)"', (LAYER / "conf/layer.conf").read_text(), re.M)[1].split()
    known = re.findall(r"^\[(.*): ", (REPOSITORY / "tests/data/yocto-python.txt").read_text(), re.M)
    assert names == " and ".join(known[1:]).split(" and ")


def test_containerd_stays_as_it_is_where_the_distribution_has_no_xen():
    (append,) = (LAYER / "dynamic-layers").rglob("containerd%.bbappend")
    (line,) = (line for line in append.read_text().splitlines() if line[:1] not in ("#", ""))
    name = re.fullmatch(r"require \$\{@bb\.utils\.contains\('DISTRO_FEATURES', 'xen', '(.*)', '', d\)\}", line)[1]
    assert "do_install:append" in (append.parent / name).read_text()


def test_the_kernel_has_as_a_module_what_meta_virtualization_has_as_one_or_not_at_all():
    """Its cfg/xen.cfg, on which xen-image-minimal relies: that image installs no other modules."""
    fragment = (LAYER / "recipes-kernel/linux/files/runx-dom0.cfg").read_text()
    assert set(re.findall(r"^CONFIG_(\w+)=m$", fragment, re.M)) == {
        "XEN_GNTDEV", "XEN_NETDEV_BACKEND", "XEN_BLKDEV_BACKEND",
        "NET_SCH_INGRESS", "NET_CLS_MATCHALL", "NET_ACT_MIRRED",
    }  # fmt: skip


def test_the_recipes_that_call_gcc_ask_for_it():
    """Where the distribution compiles with clang there is none else."""
    common = (LAYER / "recipes-core/runx/runx.inc").read_text()
    calling = [path.read_text() for path in RECIPES if "${TARGET_PREFIX}gcc" in path.read_text()]
    assert len(calling) == 2 and all("require runx.inc" in text for text in calling)
    assert 'TOOLCHAIN = "gcc"' in common.splitlines()


def test_the_recipe_of_the_kernel_has_a_source_that_the_patches_are_for():
    """kernel/patches/0018 changes what fs/fuse/readdir.c has since 6.12.111."""
    text = next(path for path in RECIPES if path.name.startswith("runx-kernel_")).read_text()
    assert int(re.search(r'^LINUX_VERSION \?= "6\.12\.(\d+)', text, re.M)[1]) >= 111


@pytest.mark.parametrize("name, task", [("kernel", "do_compile"), ("initrd", "do_configure")])
def test_a_recipe_takes_nothing_that_it_has_built_before(name, task):
    """The scripts keep it by what it was made of, as far as they know: not by the musl, nor by the patches of gcc."""
    text = (LAYER / f"recipes-core/runx/runx-{name}_{runx.VERSION}.bb").read_text()
    assert 'XDG_CACHE_HOME="${B}"' in text and f'{task}[cleandirs] = "${{B}}"' in text.splitlines()


@pytest.mark.parametrize(
    "version, reason",
    [
        ("6 12 107", "which is of Linux 6.12.107: use a source of Linux 6.12.111 or later of that series."),
        ("6 13 200", "which is of Linux 6.13.200: use"),
        ("7 12 111", "which is of Linux 7.12.111: use"),
        ("6 12 111", "/kernel/patches/0"),  # it comes to the patches
        ("6 12 1000", "/kernel/patches/0"),
    ],
)
def test_a_source_that_the_patches_are_not_for_is_refused_by_its_version(tmp_path, version, reason):
    patching = "case $0 in */patch) exit 1 ;; esac"
    said = build_kernel(tmp_path, version, patching).stderr.decode().splitlines()[-1]
    assert reason in said and said.startswith("kernel/build.sh: cannot "), said


def test_what_the_environment_has_for_other_kernels_has_no_effect(tmp_path):
    other = {"KCFLAGS": "-Ofast", "KBUILD_OUTPUT": "/elsewhere", "LLVM": "1"}
    making = f"case $0 in */make) env >{tmp_path}/seen; exit 1 ;; esac"
    build_kernel(tmp_path, "6 12 117", making, **other)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen and not [line for line in seen if line.split("=")[0] in other]


def build_kernel(tmp_path, version, doing, **environment):
    """The result of build.sh, which fails, with programs that do no more than that, for a source of that version."""
    source, tools = tmp_path / "linux-6", tmp_path / "tools"
    source.mkdir()
    tools.mkdir()
    for name in ("gcc", "make", "flex", "bison", "bc", "xz", "patch"):
        (tools / name).write_text(f"#!/bin/sh\n{doing}\n")
        (tools / name).chmod(0o755)
    names = ("VERSION", "PATCHLEVEL", "SUBLEVEL")
    lines = [f"{name} = {number}\n" for name, number in zip(names, version.split())]
    (source / "Makefile").write_text("".join(["# SPDX\n", *lines, "EXTRAVERSION =\n", "OTHERVERSION = 1\n"]))
    tarball = tmp_path / "linux.tar"
    subprocess.run(["tar", "-C", tmp_path, "-cf", tarball, source.name], check=True)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path), "CC": "gcc", **environment}
    words = ["--arch", "arm64", "--source", str(tarball)]
    result = call("sh", str(REPOSITORY / "kernel/build.sh"), *words, env=env, timeout=100)
    assert result.returncode == 1, result
    return result


def test_a_check_of_cves_is_told_what_a_recipe_builds_and_of_which_version():
    """By oe-core's class it would look for the recipe's own name and version; a recipe has one version for it."""

    class Recipe(dict):
        getVar = dict.get  # noqa: N815 - bitbake's

    for name, product, source in (
        ("kernel", "linux_kernel linux:linux", "LINUX_VERSION"), ("initrd", "busybox", "BUSYBOX_VERSION"),
    ):  # fmt: skip
        text = (LAYER / f"recipes-core/runx/runx-{name}_{runx.VERSION}.bb").read_text()
        variables = Recipe(re.findall(r'^(\w+) \??= "(.*)"$', text, re.M))
        expression, variable = re.fullmatch(r"\$\{(?:@(.*)|(\w+))\}", variables["CVE_VERSION"]).groups()
        version = eval(expression, {"d": variables}) if expression else variables[variable]
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)+", version) and variables[source].startswith(version)
        assert variables["CVE_PRODUCT"] == product


# ---- what the recipes call

# The programs of the build host that Yocto asks for itself: HOSTTOOLS of bitbake.conf in scarthgap, wrynose and master.
HOST_TOOLS = (
    "[ ar as awk basename bash bunzip2 bzip2 cat chgrp chmod chown chrpath cmp comm cp cpio cpp cut date dd diff "
    "diffstat dirname du echo egrep env expand expr false fgrep file find flock g++ gawk gcc getconf getopt git grep "
    "gunzip gzip head hostname iconv id install ld ldd ln ls make md5sum mkdir mkfifo mknod mktemp mv nm objcopy "
    "objdump od patch perl pr printf pwd python3 pzstd ranlib readelf readlink realpath rm rmdir rpcgen sed seq sh "
    "sha1sum sha224sum sha256sum sha384sum sha512sum sleep sort split stat strings strip tail tar tee test touch tr "
    "true truncate uname uniq unzstd wc wget which xargs zstd"
)


def host_tools(folder):
    """A folder that stands for PATH: what Yocto has of this machine, and a cross toolchain of its own."""
    folder.mkdir()
    for name in HOST_TOOLS.split():
        path = shutil.which(name, path=runx.PATH)
        if path:
            (folder / name).symlink_to(path)
    for name in ("gcc", "strip"):
        (folder / f"x86_64-oe-linux-{name}").symlink_to(shutil.which(name, path=runx.PATH))
    return folder


def install(folder, tools):
    """As the recipe of the runtime does it, with Yocto's tools."""
    env = {"PATH": str(tools), "DESTDIR": str(folder), "XDG_CACHE_HOME": "/no/such"}
    result = call("sh", str(REPOSITORY / "install.sh"), env=env, cwd="/")
    assert result.returncode == 0, result


# ---- an image that has nothing else

# What the command does first in the tests: no module that the image has not, although our interpreter may have it
# built in; and then what stands for Xen's devices, as in the fake dom0.
PRELUDE = """
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {allowed}:
            raise ModuleNotFoundError(f"the image has no module {{name}}")

sys.meta_path.insert(0, Missing)
"""
FAKES = """
import mmap, os, socket, struct
class server:
    FOLDER = "/run/fake"
{classes}
runx.EventChannels, runx.Grants = EventChannels, Grants
runx.lib_folder = lambda: "/run/fake/lib"  # where Xen's side sees it too
"""


def allowed_modules():
    packages = nearest()
    present = with_needed(packages, named_packages())
    return sorted(
        (BUILT_IN | {"runx"})
        | {name for name in all_modules() if any(has(packages, package, name) for package in present)}
    )


def all_modules():
    """The standard library's, by their names."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [*folder.iterdir(), *(folder / "lib-dynload").glob("*.so")]
    return {path.name.partition(".")[0] for path in files} | set(sys.builtin_module_names)


def copy(path, root):
    """A file or a folder to the same place in the image."""
    target = pathlib.Path(f"{root}{path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__", "test", "tests"), dirs_exist_ok=True)
    else:
        shutil.copy(path, target)


def copy_libraries(programs, root):
    """The shared libraries that programs and extension modules need, and what loads them."""
    listed = subprocess.run(["ldd", *programs], stdout=subprocess.PIPE, text=True).stdout
    for path in sorted(set(re.findall(r"(/\S+) \(0x", listed))):
        copy(pathlib.Path(path), root)


def copy_python(root, modules):
    """Our interpreter, with these modules alone."""
    program, library = pathlib.Path(os.path.realpath(sys.executable)), pathlib.Path(sysconfig.get_path("stdlib"))
    files = [*library.iterdir(), *(library / "lib-dynload").glob("*.so")]
    chosen = [path for path in files if path.name.partition(".")[0] in modules and path.exists()]
    for path in (program, *chosen):
        copy(path, root)
    copy_libraries([program, *(path for path in chosen if path.suffix == ".so")], root)
    link = root / "usr/bin/python3"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(program)


def make_image(root, xl, tools):
    for folder in ("dev", "etc", "proc", "run", "sys", "tmp", "var/log", "var/tmp", "bin", "usr/sbin"):
        (root / folder).mkdir(parents=True)
    (root / "var/run").symlink_to("/run")
    busybox = shutil.which("busybox")
    shutil.copy(busybox, root / "bin/busybox")
    for name in ("sh", "cat", "ls"):
        (root / "bin" / name).symlink_to("busybox")
    shutil.copy(xl, root / "usr/sbin/xl")
    copy_libraries([busybox, xl], root)
    copy_python(root, allowed_modules())
    install(root, tools)


class Image(Dom0):
    """A fake dom0 whose runX is that of the image, in the image."""

    maker = None  # what keeps the mount namespace whose root is the image

    def __init__(self, folder):
        super().__init__(folder / "dom0")
        self.root = folder / "image"
        self.root.mkdir()
        make_image(self.root, self.folder / "xl", host_tools(folder / "tools"))
        self.prelude = PRELUDE.format(allowed=set(allowed_modules()))
        fakes = FAKES.format(classes="\n".join(inspect.getsource(each) for each in (host.EventChannels, host.Grants)))
        command = self.root / "usr/sbin/runX"
        command.write_text(
            re.sub(r"^(import runx)$", lambda match: self.prelude + match[1] + fakes, command.read_text(), flags=re.M)
        )
        places = ("/proc", "/sys", "/dev", "/run", "/var/tmp", "/var/log", str(self.folder))
        steps = ["set -e", f"mount --bind {self.root} {self.root}", f"cd {self.root}", f"mkdir -p old .{self.folder}"]
        steps += [f"mount --rbind {place} .{place}" for place in places]
        steps += ["pivot_root . old", "/bin/busybox umount -l /old", "echo", "kill -STOP $$"]
        self.maker = self.make_namespace("\n".join(steps))
        self.empty = self.sight()

    def start(self, *words, program=None, **options):
        return super().start(program=program or self.inside_image("/usr/sbin/runX", *words), **options)

    def make_namespace(self, script):
        """Run a script in a mount namespace of its own; return the process, which ends with the dom0."""
        ready, tell = os.pipe()
        maker = super().start(program=["unshare", "--mount", "sh", "-c", script], stdout=tell)
        os.close(tell)
        with open(ready, "rb") as file:
            assert file.read(1) == b"\n", maker.wait()
        return maker

    def processes(self):
        return {pid: words for pid, words in super().processes().items() if not self.maker or pid != self.maker.pid}

    def inside_image(self, *words):
        """As a program of the dom0's: these words in the image."""
        return ["nsenter", f"--mount=/proc/{self.maker.pid}/ns/mnt", *words]

    def python(self, script):
        """Run a script in the image."""
        text = f"import sys\n{self.prelude}\n{script}"
        return self.run(program=self.inside_image("/usr/bin/python3", "-IS", "-c", text))


@pytest.fixture(scope="module")
def one_image(tmp_path_factory):
    if not shutil.which("busybox"):
        pytest.skip("there is no busybox here")
    if sys.base_prefix != "/usr":
        pytest.skip("the image is made of this machine's own Python alone, whose libraries ldd finds")
    image = Image(tmp_path_factory.mktemp("yocto"))
    yield image
    image.close()


@pytest.fixture
def image(one_image):
    """After the test it must be as it was."""
    yield from emptied(one_image)


def test_the_image_has_every_module_that_runx_imports(image):
    result = image.python("\n".join(f"import {module}" for module in imported_modules()))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("module", ["asyncio", "difflib", "dbm", "logging", "multiprocessing", "syslog", "xml"])
def test_the_image_has_no_other_module(image, module):
    result = image.python(f"import {module}")
    assert result.returncode == 1 and "Error: " in result.stderr.splitlines()[-1]


def test_the_command_runs_in_the_image(image):
    result = image.run("--version")
    assert (result.returncode, result.stderr, result.stdout.split()[:3]) == (0, "", ["runX", "version", runx.VERSION])
    bundle = image.folder / "bundle"
    bundle.mkdir()
    result = image.run("spec", "--bundle", str(bundle))
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((bundle / "config.json").read_text())["process"]["args"] == ["sh"]
    result = image.run("--root", "/run/none", "state", "c")
    assert (result.returncode, result.stderr) == (1, 'runX: container "c" does not exist\n')


@pytest.mark.parametrize("rootfs", ["ramdisk", "9p"])
def test_a_container_lives_in_the_image(image, rootfs):
    steps, annotations = ("out:hello ", "err:oops", "cat", "exit:3"), {"org.runx.rootfs": rootfs}
    container = image.container(*steps, annotations=annotations).created(stdin=b"and input")
    assert container.status() == "created"
    assert container.runx("start").returncode == 0
    assert (container.wait(), container.output(), container.errors()) == (3, "hello and input", "oops")
    assert (container.status(), container.runx("delete").returncode) == ("stopped", 0)
    assert container.log_text() == ""


# ---- what a recipe asks of install.sh and the build scripts


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_installations_have_the_same_bytes_and_do_not_tell_where_they_were_made(tmp_path):
    first, second, tools = tmp_path / "first", tmp_path / "a/second", host_tools(tmp_path / "tools")
    for folder in (first, second):
        install(folder, tools)
    assert contents(first) == contents(second)
    assert any(name.endswith(".pyc") for name in contents(first))
    assert not any(str(tmp_path).encode() in content for content in contents(first).values())


# What stands for busybox's source: it takes its configuration, and makes a program with the compiler that it is told
# and, as busybox does, with the options of the environment.
BUSYBOX_MAKEFILE = """\
allnoconfig:
\t: >.config
oldconfig:
busybox:
\techo 'int main(void) { return 0; }' >busybox.c
\t$(CC) $(CFLAGS) -Os -static $(LDFLAGS) -o $@ busybox.c
\t$(CROSS_COMPILE)strip $@
busybox.links:
\tprintf '/bin/sh\\n/sbin/ip\\n' >$@
"""


def build_ramdisk(folder, **env):
    """The ramdisk, made in a folder of its own; returns its bytes."""
    folder.mkdir(parents=True)
    env = {"XDG_CACHE_HOME": str(folder), **env}
    words = env.pop("words", [])
    output = folder / "initrd"
    result = call("sh", str(REPOSITORY / "initrd/build.sh"), *words, "--output", str(output), env=env, timeout=600)
    assert result.returncode == 0, result.stderr.decode()
    return output.read_bytes()


def busybox_source(folder):
    """A tarball of it."""
    source = folder / "busybox-1"
    source.mkdir(parents=True)
    (source / "Makefile").write_text(
        BUSYBOX_MAKEFILE.replace(": >.config", f"cp {REPOSITORY}/initrd/busybox.config .config")
    )
    tarball = folder / "busybox-1.tar.bz2"
    subprocess.run(["tar", "-C", folder, "-cjf", tarball, source.name], check=True)
    return tarball


@pytest.mark.skipif(os.uname().machine != "x86_64" or not shutil.which("gcc"), reason="needs gcc, on x86_64")
def test_the_ramdisk_is_built_with_yoctos_tools_alone_and_two_have_the_same_bytes(tmp_path):
    tarball, tools = busybox_source(tmp_path), host_tools(tmp_path / "tools")
    common = {
        "PATH": str(tools), "CC": "x86_64-oe-linux-gcc -O2", "CROSS_COMPILE": "x86_64-oe-linux-",
        "words": ["--busybox", str(tarball)],
    }  # fmt: skip
    first = build_ramdisk(tmp_path / "first", **common)
    before = os.umask(0o077)
    try:
        others = {"TZ": "UTC-9", "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "1", "LDFLAGS": "-no-such-option"}
        second = build_ramdisk(tmp_path / "a/b/second", **common, **others)
    finally:
        os.umask(before)
    assert first == second


# What stands for oe-core's compiler, which finds libgcc in the sysroot alone, and for musl's source with its wrapper.
OE_COMPILER = """\
#!/bin/sh
case " $* " in *" -c "* | *" -E "* | *" --version "* | *" --sysroot=SYSROOT "*) ;;
*) echo "cannot find libgcc.a" >&2 && exit 1 ;; esac
exec gcc "$@"
"""
MUSL_CONFIGURE = """\
#!/bin/sh
for word; do case $word in --prefix=*) prefix=${word#*=} ;; esac; done
printf 'install:\\n\\tmkdir -p %s/bin && cp musl-gcc %s/bin\\n' "$prefix" "$prefix" >Makefile
printf '#!/bin/sh\\nREALGCC=%s exec musl-gcc "$@"\\n' "$CC" >musl-gcc
chmod 755 musl-gcc
"""
# Of a kernel's header as oe-core's multilib_header.bbclass leaves it, on Arm.
MULTILIB_HEADER = """\
#include <bits/wordsize.h>
#if __WORDSIZE == 64
#include <asm/NAME-64.h>
#else
#error "not the size of a word here"
#endif
"""


def oe_sysroot(folder):
    """The kernel's headers, as they are in the sysroot of an image with glibc."""
    include = folder / "usr/include"
    shutil.copytree("/usr/include/x86_64-linux-gnu/asm", include / "asm")
    for name in ("linux", "asm-generic"):
        (include / name).symlink_to(f"/usr/include/{name}")
    for name in ("types", "unistd"):
        (include / f"asm/{name}.h").rename(include / f"asm/{name}-64.h")
        (include / f"asm/{name}.h").write_text(MULTILIB_HEADER.replace("NAME", name))
    return folder


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def recipe_function(name, function, variables):
    """The shell of a function of a recipe's, as bitbake would write it."""
    text = next(path for path in RECIPES if path.name.startswith(f"{name}_")).read_text()
    body = re.search(rf"^{function}\(\) \{{\n(.*?)^\}}$", text, re.M | re.S)[1]
    return re.sub(r"\$\{([A-Z_]+)\}", lambda match: variables[match[1]], body)


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or not shutil.which("musl-gcc"), reason="needs musl-tools, on x86_64"
)
def test_the_recipe_of_the_ramdisk_builds_it_with_the_compiler_and_headers_of_oe_core(tmp_path):
    tools, sysroot, sources = host_tools(tmp_path / "tools"), oe_sysroot(tmp_path / "sysroot"), tmp_path / "sources"
    (tools / "musl-gcc").symlink_to(shutil.which("musl-gcc"))
    (tools / "x86_64-oe-linux-gcc").unlink()
    script(tools / "x86_64-oe-linux-gcc", OE_COMPILER.replace("SYSROOT", str(sysroot)))
    script(sources / "musl-1/configure", MUSL_CONFIGURE)
    busybox_source(sources)
    variables = {
        "B": str(tmp_path / "build"), "S": str(REPOSITORY), "RUNX_SOURCES": str(sources), "RUNX_ARCH": "x86_64",
        "MUSL_VERSION": "1", "BUSYBOX_VERSION": "1", "TARGET_SYS": "x86_64-oe-linux", "PARALLEL_MAKE": "-j2",
        "TARGET_PREFIX": "x86_64-oe-linux-", "TUNE_CCARGS": "-m64", "TOOLCHAIN_OPTIONS": f" --sysroot={sysroot}",
        "STAGING_INCDIR": f"{sysroot}/usr/include",
    }  # fmt: skip
    lines = ["set -e", 'oe_runmake() { make "$@"; }']
    lines += [f"({recipe_function('runx-initrd', function, variables)})" for function in ("do_configure", "do_compile")]
    result = call("sh", "-c", "\n".join(lines), env={"PATH": str(tools)}, timeout=600)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "build/initrd").stat().st_size > 0
