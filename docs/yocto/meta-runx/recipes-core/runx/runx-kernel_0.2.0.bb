# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Linux kernel of RunX's VMs"
LICENSE = "GPL-2.0-only"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/GPL-2.0-only;md5=801f80980d171dd6425610833a22dbe6"

require runx.inc

# Any 6.12: the patches are for the series. build.sh unpacks it itself, without what takes only room.
LINUX_VERSION ?= "6.12.104"
SRC_URI += "https://cdn.kernel.org/pub/linux/kernel/v6.x/linux-${LINUX_VERSION}.tar.xz;name=linux;unpack=0"
SRC_URI[linux.sha256sum] = "949d166a1263bd0cf0c5aab44eeb57869615099e7c48bf88d0e4adb77379b999"

COMPATIBLE_HOST = "(x86_64|aarch64|arm).*-linux.*"

DEPENDS = "bc-native bison-native flex-native xz-native"
DEPENDS:append:x86-64 = " elfutils-native"

do_configure[noexec] = "1"

# The compiler alone: a kernel chooses its own options, and needs no C library.
do_compile() {
    unset CFLAGS CPPFLAGS CXXFLAGS LDFLAGS MACHINE
    export CC="${TARGET_PREFIX}gcc" CROSS_COMPILE="${TARGET_PREFIX}" XDG_CACHE_HOME="${B}" MAKEFLAGS="${PARALLEL_MAKE}"
    export HOSTCFLAGS="${BUILD_CFLAGS}" HOSTLDFLAGS="${BUILD_LDFLAGS}"
    ${S}/kernel/build.sh --arch ${RUNX_ARCH} --source ${RUNX_SOURCES}/linux-${LINUX_VERSION}.tar.xz --output ${B}/kernel
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
