# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Linux kernel of RunX's VMs"
LICENSE = "GPL-2.0-only"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/GPL-2.0-only;md5=801f80980d171dd6425610833a22dbe6"

require runx.inc

# Debian's package of the source, with which RunX is tested; a tarball of kernel.org's would do. The patches are for
# 6.12.111 and later of that series. What the pool has no more is in the archive.
LINUX_VERSION ?= "6.12.117-1~deb12u1"
LINUX_POOL = "https://deb.debian.org/debian-security/pool/updates/main/l/linux-6.12"
SRC_URI += "${LINUX_POOL}/linux-source-6.12_${LINUX_VERSION}_all.deb;name=linux"
SRC_URI[linux.sha256sum] = "e849faf31ca3555757f3a8877cb01af92122f744f75d1f3102734651c4e14703"
MIRRORS:append = " \
    https://deb.debian.org/debian-security \
    https://snapshot.debian.org/archive/debian-security/20261127T000000Z \
"

# As oe-core's kernel.bbclass names it.
CVE_PRODUCT = "linux_kernel linux:linux"
CVE_VERSION = "${@d.getVar('LINUX_VERSION').partition('-')[0]}"

COMPATIBLE_HOST = "(x86_64|aarch64|arm).*-linux.*"

DEPENDS = "bc-native bison-native flex-native xz-native"
DEPENDS:append:x86-64 = " elfutils-native"

do_configure[noexec] = "1"

# build.sh keeps the kernel there, and would take that of a gcc with fewer patches.
do_compile[cleandirs] = "${B}"

# The compiler alone: a kernel chooses its own options, and needs no C library.
do_compile() {
    unset CFLAGS CPPFLAGS CXXFLAGS LDFLAGS MACHINE
    export CC="${TARGET_PREFIX}gcc" CROSS_COMPILE="${TARGET_PREFIX}" XDG_CACHE_HOME="${B}" MAKEFLAGS="${PARALLEL_MAKE}"
    export HOSTCFLAGS="${BUILD_CFLAGS}" HOSTLDFLAGS="${BUILD_LDFLAGS}"
    ${S}/kernel/build.sh --arch ${RUNX_ARCH} --source ${RUNX_SOURCES}/usr/src/linux-source-6.12.tar.xz \
        --output ${B}/kernel
}

do_install() {
    install -D -m 644 ${B}/kernel ${D}${RUNX_FOLDER}/kernel
}

FILES:${PN} = "${RUNX_FOLDER}/kernel"

# On x86 it is an ELF file, which build.sh has stripped of what Xen does not read.
INHIBIT_PACKAGE_STRIP = "1"
INHIBIT_SYSROOT_STRIP = "1"
INHIBIT_PACKAGE_DEBUG_SPLIT = "1"
INSANE_SKIP:${PN} = "already-stripped ldflags textrel"
