# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Ramdisk of RunX's VMs"
DESCRIPTION = "RunX's init in C and busybox, static with musl, whatever the C library of the image."
LICENSE = "Apache-2.0 & GPL-2.0-only & MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57 \
    file://${RUNX_SOURCES}/musl-${MUSL_VERSION}/COPYRIGHT;md5=0c2904cdc34777fb4067732bae145506 \
    file://${COMMON_LICENSE_DIR}/GPL-2.0-only;md5=801f80980d171dd6425610833a22dbe6"

require runx.inc

# build.sh unpacks busybox itself.
BUSYBOX_VERSION ?= "1.37.0"
MUSL_VERSION ?= "1.2.6"
SRC_URI += "https://busybox.net/downloads/busybox-${BUSYBOX_VERSION}.tar.bz2;name=busybox;unpack=0 \
    https://musl.libc.org/releases/musl-${MUSL_VERSION}.tar.gz;name=musl"
SRC_URI[busybox.sha256sum] = "3311dff32e746499f4df0d5df04d7eb396382d7e108bb9250e7b519b837043a4"
SRC_URI[musl.sha256sum] = "d585fd3b613c66151fc3249e8ed44f77020cb5e6c1e635a616d3f9f82460512a"

# A recipe has one version to look for: musl's is another.
CVE_PRODUCT = "busybox"
CVE_VERSION = "${BUSYBOX_VERSION}"

COMPATIBLE_HOST = "(x86_64|aarch64|arm).*-linux.*"

inherit python3native

# build.sh keeps busybox there, and would take it with an older musl in it.
do_configure[cleandirs] = "${B}"

# The image's glibc would make the ramdisk five times as large. musl comes with a wrapper of the compiler; the kernel's
# headers, which it has not, are those of the sysroot, without glibc's that lie beside them. On Arm oe-core's, which are
# for multilib, ask one of glibc's for the size of a word.
do_configure() {
    mkdir -p ${B}/musl-build ${B}/include/bits
    echo '#define __WORDSIZE (__SIZEOF_LONG__ * 8)' >${B}/include/bits/wordsize.h
    cd ${B}/musl-build
    CC="${TARGET_PREFIX}gcc" CROSS_COMPILE="${TARGET_PREFIX}" CFLAGS="-Os ${TUNE_CCARGS}" LDFLAGS="" \
        ${RUNX_SOURCES}/musl-${MUSL_VERSION}/configure --target=${TARGET_SYS} --prefix=${B}/musl \
        --syslibdir=${B}/musl/lib --disable-shared --enable-wrapper=gcc
    for headers in asm asm-generic linux; do
        ln -s ${STAGING_INCDIR}/$headers ${B}/include/$headers
    done
}

do_compile() {
    unset CFLAGS CPPFLAGS CXXFLAGS LDFLAGS
    oe_runmake -C ${B}/musl-build install
    # libgcc is in the sysroot
    export CC="${B}/musl/bin/musl-gcc ${TOOLCHAIN_OPTIONS} ${TUNE_CCARGS} -idirafter ${B}/include"
    export CROSS_COMPILE="${TARGET_PREFIX}"
    export XDG_CACHE_HOME="${B}" MAKEFLAGS="${PARALLEL_MAKE}"
    ${S}/initrd/build.sh --arch ${RUNX_ARCH} --busybox ${RUNX_SOURCES}/busybox-${BUSYBOX_VERSION}.tar.bz2 \
        --output ${B}/initrd
}

do_install() {
    install -D -m 644 ${B}/initrd ${D}${RUNX_FOLDER}/initrd
}

FILES:${PN} = "${RUNX_FOLDER}/initrd"
