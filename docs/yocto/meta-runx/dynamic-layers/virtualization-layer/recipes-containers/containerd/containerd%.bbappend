# SPDX-License-Identifier: Apache-2.0
# For scarthgap's containerd-opencontainers too.
FILESEXTRAPATHS:prepend := "${THISDIR}/files:"

SRC_URI:append = " file://containerd-runx.toml"

do_install:append() {
    install -D -m 644 ${@d.getVar('UNPACKDIR') or d.getVar('WORKDIR')}/containerd-runx.toml \
        ${D}${sysconfdir}/containerd/config.toml
}

CONFFILES:${PN} += "${sysconfdir}/containerd/config.toml"
