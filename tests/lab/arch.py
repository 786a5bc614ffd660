# SPDX-License-Identifier: Apache-2.0
"""What differs between the architectures that the lab emulates."""

from __future__ import annotations

import dataclasses

DOM0_MEMORY = 1024  # MiB

# dom0 gets one of the two processors.  Interrupting the other one, for each TLB flush and each
# patch of the kernel's code, is so slow in emulation that all of dom0 is slower with two; and
# the guests have the second one to themselves.
XEN_OPTIONS = (
    f"dom0_mem={DOM0_MEMORY}M,max:{DOM0_MEMORY}M dom0_max_vcpus=1 loglvl=warning guest_loglvl=warning bootscrub=0"
)

# After loglevel, each option saves a check or a wait that takes a tenth of a second or more.
KERNEL_OPTIONS = "console=hvc0 panic=-1 loglevel=4 mitigations=off rodata=off audit=0 cryptomgr.notests"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Of the emulated machine; packages are Debian's."""

    name: str  # for kernel/build.sh and initrd/build.sh
    debian: str  # for Debian, and in an image's configuration
    compiler: str
    qemu_package: str
    kernel_package: str
    xen_suffix: str  # of its file in /boot
    bus: str  # as virtio's devices have it in their names in QEMU
    boot_modules: tuple[str, ...]  # those that lead to the disk
    foreign: bool  # nothing of it runs on this machine


X86_64 = Architecture(
    name="x86_64",
    debian="amd64",
    compiler="gcc",
    qemu_package="qemu-system-x86",
    kernel_package="linux-image-amd64",
    xen_suffix=".gz",
    bus="pci",
    boot_modules=("virtio_pci", "virtio_blk", "ext4"),
    foreign=False,
)
ARM64 = Architecture(
    name="arm64",
    debian="arm64",
    compiler="aarch64-linux-gnu-gcc",
    qemu_package="qemu-system-arm",
    kernel_package="linux-image-arm64",
    xen_suffix="",
    bus="device",
    boot_modules=("virtio_mmio", "virtio_blk", "ext4"),
    foreign=True,
)
ARCHITECTURES = {each.name: each for each in (X86_64, ARM64)}


def machine_options(arch: Architecture, kernel_options: str) -> list[str]:
    """QEMU, and its options for the machine and for what it boots.  Paths are in the image's folder; `kernel_options`
    are more of dom0's."""
    options = f"{KERNEL_OPTIONS} {kernel_options}"
    # fmt: off
    if arch is ARM64:
        # QEMU's guest-loader puts dom0's kernel into memory, and into the device tree that Xen reads, where it was.
        return [
            "qemu-system-aarch64", "-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a57",
            "-kernel", "xen", "-append", f"console=dtuart {XEN_OPTIONS} noreboot",
            "-device", f"guest-loader,addr=0x49000000,kernel=vmlinux,bootargs={options} rdinit=/init",
            "-device", "guest-loader,addr=0x50000000,initrd=initrd.img",
        ]
    # Xen in software emulation is stable only with four features off: with xsave, vector registers
    # leak from one domain into another; with smap or smep dom0 crashes; with rdtscp PVH guests do.
    # Without erms memory is copied eight bytes at a time, not one: reading the disk is then three times
    # as fast.  There is nothing to protect from speculation.  A newer QEMU is no better: with 10.0 the tests take as
    # long, and PVH guests end as they start, for to Xen each reads cr0 where it reads cr2.  A dom0 that watches its TSC
    # finds it wrong after some minutes, and from then on each look at the clock is a system call, of which Python alone
    # makes three hundred until it has started.
    return [
        "qemu-system-x86_64", "-machine", "q35", "-cpu", "max,-smap,-smep,-rdtscp,-xsave,-erms",
        "-kernel", "xen", "-append", f"console=com1 com1=115200,8n1 {XEN_OPTIONS} spec-ctrl=no",
        "-initrd", f"vmlinux {options} pmtmr=0 tsc=nowatchdog,initrd.img",
        "-global", "virtio-net-pci.romfile=",
    ]
    # fmt: on
