# SPDX-License-Identifier: Apache-2.0
"""The members of an archive, read by its definition: Documentation/driver-api/early-userspace in the kernel."""


def members(archive):
    """(name, mode, data) of each member of a newc archive, read by its definition."""
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701" and offset % 4 == 0
        numbers = [int(archive[offset + 6 + 8 * n : offset + 14 + 8 * n], 16) for n in range(13)]
        name_end = offset + 110 + numbers[11]
        name = archive[offset + 110 : name_end - 1].decode()
        data_start = (name_end + 3) & ~3
        data = archive[data_start : data_start + numbers[6]]
        if name == "TRAILER!!!":
            return
        yield name, numbers[1], data
        offset = (data_start + len(data) + 3) & ~3
