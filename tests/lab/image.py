#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Make the disk image of the lab's dom0, and what QEMU needs to boot it.

    image.py [ARCHITECTURE [RELEASE]]   print the folder that holds the image, making it first if need be

The folder is ${XDG_CACHE_HOME:-~/.cache}/runx/dom0-<machine>-<key>, see machine_name():

    xen         the hypervisor, unpacked; on x86 an ELF file that QEMU loads by the multiboot protocol
    vmlinux     dom0's kernel, unpacked: emulated unpacking would cost a second of every boot
    initrd.img  busybox and the modules that lead to the disk
    disk.img    an ext4 file system with Debian and the dom0 tools (sparse)

<key> is a hash over all that decides the content: this file, lab-init, report.c, and what arch.py and
release.py say of the machine.  What changes often (dom0-init, the agent, runX) is not in the image: the lab mounts the
working tree in the dom0.

Needs root, for the chroot that packages are installed in; those of an architecture that does not run here are only
unpacked, and what their scripts would do is in settle().  Progress goes to stderr.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arch import ARCHITECTURES, X86_64, Architecture
from release import BOOKWORM, RELEASES, Release

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "report.c"

SUITE = BOOKWORM.name  # of this machine

# fmt: off
PACKAGES = [
    # Xen's tools; no QEMU, which only recommendations of xen-utils would bring
    "xenstore-utils",
    # container engines, and what they call
    "containerd", "runc", "containernetworking-plugins", "podman", "conmon", "docker.io", "dnsmasq-base",
    # runX's interpreter; the tests
    "python3", "python3-pytest", "strace", "iperf3", "jq", "socat",
    # root file systems of containers
    "e2fsprogs", "squashfs-tools", "erofs-utils",
    # scopes for --systemd-cgroup; it is not what boots this dom0
    "systemd",
    # a small system around them
    "busybox-static", "iproute2", "iptables", "bridge-utils", "kmod", "mount",
    "netbase", "procps", "util-linux",
]
# fmt: on
STANDS_STILL = "--aptopt=Acquire::Check-Valid-Until false"  # a mirror may
# What mmdebstrap does before it unpacks anything; and links that scripts of packages would make.
MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"
UNPACKED_LINKS = {
    "var/run": "/run",
    "var/lock": "/run/lock",
    "etc/mtab": "../proc/self/mounts",
    "usr/bin/awk": "mawk",
    "usr/bin/which": "which.debianutils",
    "usr/sbin/iptables": "iptables-nft",
    "usr/sbin/iptables-save": "iptables-nft-save",
    "usr/sbin/iptables-restore": "iptables-nft-restore",
    "usr/sbin/ip6tables": "ip6tables-nft",
    "usr/sbin/ip6tables-save": "ip6tables-nft-save",
    "usr/sbin/ip6tables-restore": "ip6tables-nft-restore",
}

# Nobody reads documentation in the lab.
EXCLUDED_PATHS = "/usr/share/doc/* /usr/share/man/* /usr/share/info/* /usr/share/locale/*".split()

# Of the kernel's modules, drivers of real hardware are four fifths and of no use here.
DRIVERS_KEPT = {"block", "char", "net", "vhost", "virtio", "xen"}
NET_DRIVERS_KEPT = {"xen-netback"}  # besides those directly in drivers/net
# The image must have what dom0-init loads.
LATER_MODULES = (
    "virtio_console virtio_net 9p 9pnet_virtio 9pnet_xen xen-evtchn xen-gntdev xen-gntalloc xen-privcmd "
    "xen-netback xen-blkback bridge veth tun loop overlay"
).split()

DISK_SIZE = "6G"  # sparse; free space is for containers
BUSYBOX_REFERENCE = "docker.io/library/busybox:latest"
BUSYBOX_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BUSYBOX_ETC = {
    "passwd": """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
""",
    "group": """\
root:x:0:
daemon:x:1:
tty:x:5:
www-data:x:33:
users:x:100:
nogroup:x:65534:
""",
    "shells": "/bin/sh\n",
}

INITRAMFS_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in @MODULES@; do /bin/busybox insmod /modules/$module; done
# With the type, for there is no /proc/filesystems to guess from.
/bin/busybox mount -t ext4 -o noatime,nobarrier,noinit_itable /dev/vda /root
exec /bin/busybox switch_root /root /sbin/lab-init
"""

BEGAN = time.monotonic()


def say(text: str) -> None:
    """Report progress."""
    print(f"dom0 image: {time.monotonic() - BEGAN:.0f} s: {text}", file=sys.stderr, flush=True)


class ImageError(Exception):
    """The image cannot be made; the message says what failed and what to do."""


def cache_root() -> Path:
    """The folder for everything that RunX's lab keeps between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runx"


def machine_name(arch: Architecture, release: Release) -> str:
    """What tells the machine from others, in the names of what is kept of it."""
    return arch.name if release is BOOKWORM else f"{release.name}-{arch.name}"


def image_folder(arch: Architecture = X86_64, release: Release = BOOKWORM) -> Path:
    """Where the image for the present inputs is, or would be."""
    digest = hashlib.sha256(f"{arch!r}{release!r}".encode())
    for source in (Path(__file__), HERE / "lab-init", REPORT):
        digest.update(source.read_bytes() + b"\0")
    return cache_root() / f"dom0-{machine_name(arch, release)}-{digest.hexdigest()[:16]}"


def run(*argv: str | Path, **options: Any) -> str:
    """Run a program to its end and return its stdout; stderr is shown only when it fails."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # a Ctrl-C is for us; we end the program
        **options,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        raise ImageError(
            f"making the dom0 image: {argv[0]} failed with status {done.returncode}; its messages are above"
        )
    return done.stdout


# -- Debian ------------------------------------------------------------------------------------


def apt_sources(suite: str = SUITE) -> str:
    """The lines of a sources.list for a suite, from the mirrors that this machine itself uses for its own."""
    keys = "$(ORIGIN)\t$(RELEASE)\t$(REPO_URI)\t$(COMPONENT)"
    targets = run("apt-get", "indextargets", "--format", keys, "Created-By: Packages")
    lines = set()
    for target in targets.splitlines():
        origin, release, uri, component = target.split("\t")
        if origin == "Debian" and release.split("-")[0] == SUITE and component == "main":
            lines.add(f"deb {uri} {release.replace(SUITE, suite)} {component}\n")
    if not lines:
        raise ImageError(
            f"looking for a Debian mirror: apt's sources name none for {SUITE}; "
            "run the lab on Debian 12, or add its sources and run apt-get update"
        )
    return "".join(sorted(lines))


def make_root(root: Path, suite: str, packages: list[str], excluded: list[str]) -> None:
    """Install packages of the suite and what they need into `root`, without the files that match these patterns."""
    # In a PID and mount namespace that ends when we do, so that an interrupted run leaves neither
    # processes nor mounts behind.
    shield = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    options = ["--mode=root", "--variant=essential", "--format=directory", f"--include={','.join(packages)}"]
    options += [f"--dpkgopt=path-exclude={path}" for path in excluded] + ["--dpkgopt=force-unsafe-io", STANDS_STILL]
    run(*shield, "mmdebstrap", *options, suite, root, "-", input=apt_sources(suite))


def unpack(folder: Path, suite: str, arch: Architecture, packages: list[str], excluded: list[str]) -> None:
    """Unpack packages of the suite and what they need into `folder`, without the files that match these patterns."""
    options = ["--mode=root", "--variant=extract", "--format=directory", *(f"--include={name}" for name in packages)]
    options += [f"--architectures={arch.debian}", "--skip=check/qemu", f"--hook-dir={MERGED_USR}", STANDS_STILL]
    options += [f"--dpkgopt=path-exclude={path}" for path in excluded]
    run("mmdebstrap", *options, suite, folder, "-", input=apt_sources(suite))


def settle(root: Path) -> None:
    """Do what matters here of what the scripts of unpacked packages would do."""
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    with open(root / "etc/group", "a", encoding="utf-8") as file:
        file.write("docker:x:106:\n")
    for link, target in UNPACKED_LINKS.items():
        run("rm", "-rf", root / link)  # some packages have files in /var/run
        run("ln", "-s", target, root / link)
    (root / "var/log/xen").mkdir()
    # This machine's Python is of bookworm's version, so its compiled modules are the same.
    run("/usr/bin/python3", "-m", "compileall", "-q", "-s", root, "-p", "/", *root.glob("usr/lib/python3*"))


# -- kernel, modules and the small initramfs -----------------------------------------------------

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878


def find_kernel(unpacked: Path) -> Path:
    """Where the only kernel is: with its modules, in newer releases."""
    return next(path for name in ("boot/vmlinuz-*", "lib/modules/*/vmlinuz") for path in unpacked.glob(name))


def unpacked_kernel(bzimage: bytes) -> bytes:
    """The ELF file inside an x86 bzImage (see Documentation/x86/boot.rst, payload_offset); on Arm it is none."""
    if bzimage[0x202:0x206] != b"HdrS":
        return bzimage
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    packed = bzimage[start : start + length - 4]  # behind it is the size of what is in it
    if packed.startswith(ZSTD_MAGIC):
        return subprocess.run(["zstd", "--decompress"], input=packed, stdout=subprocess.PIPE, check=True).stdout
    return lzma.decompress(packed)


def install_modules(unpacked: Path, root: Path, arch: Architecture) -> str:
    """Move the modules that dom0 can use into `root`; return the kernel's version."""
    source = next((unpacked / "lib/modules").iterdir())
    drivers = source / "kernel/drivers"
    for folder in drivers.iterdir():
        if folder.name not in DRIVERS_KEPT:
            shutil.rmtree(folder)
    for folder in (drivers / "net").iterdir():
        if folder.is_dir() and folder.name not in NET_DRIVERS_KEPT:
            shutil.rmtree(folder)
    shutil.rmtree(source / "kernel/sound")
    packed = list(source.rglob("*.ko.xz"))  # newer releases' are; unpacking them is slow in emulation, too
    if packed:
        run("xz", "--decompress", *packed)
    version = source.name
    target = root / "usr/lib/modules" / version
    target.parent.mkdir(exist_ok=True)
    shutil.move(source, target)
    run("depmod", "-b", root, version)
    for module in [*arch.boot_modules, *LATER_MODULES]:
        module_files(root, version, module)
    return version


def module_files(root: Path, version: str, module: str) -> list[Path]:
    """The files to load for `module`, in order."""
    steps = run("modprobe", "-d", root, "-C", "/dev/null", "-S", version, "--show-depends", module)
    return [Path(line.split()[1]) for line in steps.splitlines() if line.startswith("insmod")]


def cpio_entry(name: str, mode: int, data: bytes, inode: int) -> bytes:
    """One member of a cpio archive in the "newc" format that Linux's initramfs takes."""
    fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def make_initramfs(root: Path, version: str, boot_modules: Iterable[str]) -> bytes:
    """A cpio archive that loads modules, mounts the disk and starts its lab-init."""
    files = {}
    for module in boot_modules:
        for path in module_files(root, version, module):
            files[path.name] = path.read_bytes()
    init = INITRAMFS_INIT.replace("@MODULES@", " ".join(files))
    entries = [(folder, stat.S_IFDIR | 0o755, b"") for folder in ("bin", "dev", "modules", "root")]
    entries.append(("init", stat.S_IFREG | 0o755, init.encode()))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes()))
    entries += [(f"modules/{name}", stat.S_IFREG | 0o644, data) for name, data in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    return b"".join(cpio_entry(*entry, inode) for inode, entry in enumerate(entries, 1))


# -- the busybox container image -----------------------------------------------------------------


def busybox_layer(busybox: Path) -> bytes:
    """A tar archive of a root file system: busybox, a link per applet (those of this machine's), the usual folders."""
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o755, data: bytes = b"", link: str = "") -> None:
            member = tarfile.TarInfo(name)  # its times and owners are 0
            member.type, member.mode, member.size, member.linkname = kind, mode, len(data), link
            tar.addfile(member, io.BytesIO(data))

        for folder in "bin dev etc home mnt proc run sbin sys usr usr/bin usr/sbin var var/log var/spool".split():
            add(folder, tarfile.DIRTYPE)
        add("root", tarfile.DIRTYPE, 0o700)
        for folder in ("tmp", "var/tmp"):
            add(folder, tarfile.DIRTYPE, 0o1777)
        add("var/run", tarfile.SYMTYPE, 0o777, link="../run")
        for name, text in BUSYBOX_ETC.items():
            add(f"etc/{name}", mode=0o644, data=text.encode())
        add("etc/shadow", mode=0o640, data=b"root:*:::::::\n")
        add("bin/busybox", data=busybox.read_bytes())
        for applet in sorted(set(run("busybox", "--list-full").split())):
            # /linuxrc and the like, directly in the root, are for initramfs images
            if "/" in applet and applet != "bin/busybox":
                add(applet, tarfile.SYMTYPE, 0o777, link="/bin/busybox")
    return blob.getvalue()


def make_busybox_image(busybox: Path, architecture: str) -> bytes:
    """An OCI image layout in a tar archive, as `ctr image import` takes it."""
    blobs: dict[str, bytes] = {}

    def describe(content: object, media_type: str) -> dict[str, Any]:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        media_type = f"application/vnd.oci.image.{media_type}"
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    layer = describe(busybox_layer(busybox), "layer.v1.tar")
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Env": [f"PATH={BUSYBOX_PATH}"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        "history": [{"created_by": "the lab, from Debian's busybox-static"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe(config, "config.v1+json"),
        "layers": [layer],
    }
    entry = describe(manifest, "manifest.v1+json")
    entry["annotations"] = {
        "io.containerd.image.name": BUSYBOX_REFERENCE,
        "org.opencontainers.image.ref.name": "latest",
    }
    index = {"schemaVersion": 2, "manifests": [entry]}
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), **blobs}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue()


# -- putting it together -----------------------------------------------------------------------


def configure(root: Path, arch: Architecture) -> None:
    """Write the few files that make `root` the lab's dom0."""
    shutil.copy(HERE / "lab-init", root / "usr/sbin/lab-init")
    (root / "usr/sbin/lab-init").chmod(0o755)
    for folder in ("repo", "share", "usr/share/lab"):
        (root / folder).mkdir()
    (root / "usr/share/lab/busybox.tar").write_bytes(make_busybox_image(root / "bin/busybox", arch.debian))
    run(arch.compiler, "-static", "-Os", "-s", "-Wall", "-o", root / "usr/share/lab/report", REPORT)
    (root / "etc/hostname").write_text("dom0\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost dom0\n::1 localhost\n")
    (root / "etc/machine-id").write_text("72756e786c61623072756e786c616230\n")
    resolv_conf = root / "etc/resolv.conf"
    resolv_conf.unlink(missing_ok=True)
    resolv_conf.touch()


def make_disk(root: Path, disk: Path) -> None:
    """Put `root` into an ext4 image.

    It never outlives a boot that writes to it, so it has no journal and no checksums.
    """
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-d", root, disk, DISK_SIZE)


def make_image(target: Path, arch: Architecture, release: Release) -> None:
    """Make the image in a folder beside `target`, then rename that folder to it."""
    work = Path(tempfile.mkdtemp(prefix="partial-dom0-", dir=target.parent))
    try:
        root, unpacked, result = work / "root", work / "unpacked", work / "result"
        result.mkdir()
        packages = [f"xen-utils-{release.xen}", *PACKAGES, *release.packages]
        say(f"installing {len(packages)} Debian packages and what they need")
        if arch.foreign:
            unpack(root, release.name, arch, ["?essential", *packages], EXCLUDED_PATHS)
            settle(root)
        else:
            make_root(root, release.name, packages, EXCLUDED_PATHS)
        say("unpacking Xen and dom0's kernel")
        # Not installed: that would bring an initramfs generator, udev and a boot loader's configuration along.
        packages = [arch.kernel_package, f"xen-hypervisor-{release.xen}-{arch.debian}"]
        unpack(unpacked, release.name, arch, packages, EXCLUDED_PATHS)
        kernel = find_kernel(unpacked).read_bytes()
        (result / "vmlinux").write_bytes(unpacked_kernel(kernel))
        version = install_modules(unpacked, root, arch)
        (root / f"boot/vmlinuz-{version}").write_bytes(kernel)  # for a container with a kernel of its own
        hypervisor = (unpacked / f"boot/xen-{release.xen}-{arch.debian}{arch.xen_suffix}").read_bytes()
        (result / "xen").write_bytes(gzip.decompress(hypervisor) if arch.xen_suffix else hypervisor)
        (result / "initrd.img").write_bytes(make_initramfs(root, version, arch.boot_modules))
        configure(root, arch)
        say("filling the disk")
        make_disk(root, result / "disk.img")
        result.rename(target)
        say("done")
    finally:
        run("rm", "-rf", "--one-file-system", work)


def remove_old_images(current: Path) -> None:
    """Remove all images of the machine but the current one and the one used last before it.

    That one may belong to another checkout, and two of them must not take turns in rebuilding.
    """
    others = [folder for folder in current.parent.glob(f"{current.name.rpartition('-')[0]}-*") if folder != current]
    others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in others[1:]:
        folder.rename(folder.with_name(f"partial-{folder.name}"))  # never half an image under its name
    remove_leftovers(current.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted run has left."""
    for leftover in folder.glob("partial-dom0-*"):
        run("rm", "-rf", "--one-file-system", leftover)


def main() -> int:
    arch = ARCHITECTURES[sys.argv[1]] if sys.argv[1:] else X86_64
    release = RELEASES[sys.argv[2]] if sys.argv[2:] else BOOKWORM
    target = image_folder(arch, release)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "image.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two labs want the image: one makes it
        if not target.is_dir():
            remove_leftovers(target.parent)
            make_image(target, arch, release)
            remove_old_images(target)
        os.utime(target)  # the time of its last use
    print(target)
    return 0


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, lambda signum, frame: sys.exit(128 + signum))
    try:
        sys.exit(main())
    except (ImageError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"image.py: {error}")
