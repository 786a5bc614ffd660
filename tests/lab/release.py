# SPDX-License-Identifier: Apache-2.0
"""What differs between the releases of Debian that the lab's dom0 is made of."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Release:
    """Of Debian."""

    name: str
    xen: str  # its version, in the names of packages and files
    packages: tuple[str, ...] = ()  # that it has beside those of all releases


BOOKWORM = Release("bookworm", "4.17")
# What was part of docker.io, and what Podman's network needs since it is no longer CNI's
TRIXIE = Release("trixie", "4.20", ("docker-cli", "nftables"))
FORKY = Release("forky", "4.20", TRIXIE.packages)
RELEASES = {each.name: each for each in (BOOKWORM, TRIXIE, FORKY)}
