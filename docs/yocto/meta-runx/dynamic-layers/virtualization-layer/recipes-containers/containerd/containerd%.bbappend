# SPDX-License-Identifier: Apache-2.0
# For scarthgap's containerd-opencontainers too. A distribution without Xen has the containerd that it had.
require ${@bb.utils.contains('DISTRO_FEATURES', 'xen', 'containerd-runx.inc', '', d)}
