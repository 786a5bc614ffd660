# SPDX-License-Identifier: Apache-2.0
SUMMARY = "OCI runtime that runs each container as a Xen VM"
DESCRIPTION = "Called by containerd, Podman or Docker in runc's place. One Python file, which drives Xen by xl; \
no agent in the VM, no daemon and no QEMU."
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

require runx.inc

inherit bash-completion features_check python3native

REQUIRED_DISTRO_FEATURES = "xen"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

# The VMs' kernel and ramdisk have recipes of their own: an empty cache keeps install.sh from looking for some of this
# machine's. Python, with which it compiles the module, is that of the target in version.
do_install() {
    XDG_CACHE_HOME=${B} DESTDIR=${D} PREFIX=${prefix} ${S}/install.sh
}

FILES:${PN} += "${RUNX_FOLDER}"

# python3-*: the modules that runx.py imports, by oe-core's python3-manifest.json; tests/test_yocto.py holds this list.
RDEPENDS:${PN} = "\
    python3-core \
    python3-compression \
    python3-crypt \
    python3-ctypes \
    python3-fcntl \
    python3-io \
    python3-json \
    python3-mmap \
    python3-resource \
    python3-terminal \
    runx-initrd \
    runx-kernel \
    xen-tools-xl \
"

# xenstored, what starts it, and what makes libxl's folders in /var, which xen-image-minimal has by way of all of
# xen-tools; and what files/runx-dom0.cfg makes modules, where dom0's kernel has them as such.
RRECOMMENDS:${PN} = "\
    kernel-module-act-mirred \
    kernel-module-cls-matchall \
    kernel-module-loop \
    kernel-module-sch-ingress \
    kernel-module-xen-blkback \
    kernel-module-xen-evtchn \
    kernel-module-xen-gntdev \
    kernel-module-xen-netback \
    xen-tools-volatiles \
    xen-tools-xencommons \
"
