"""File descriptors: how many connections a server takes, so that some are left for files.

A process out of descriptors can't open an adapter file, its registry or its log. Connections are
what anybody can open, so they are bounded by RLIMIT_NOFILE: server/open_connections.py.
"""

import logging
import os
import resource

log = logging.getLogger("trunkline.serve")

# For files while connections fill their share: a registry connection of each of some 40 threads
# takes three descriptors, uploads and adapter files one each.
KEPT_FOR_FILES = 192
FEWEST = 16  # connections, also where the limit is too low for both


def most_connections() -> int:
    """By the limit of this process and the descriptors that it has open now; logged.

    It is a warning where the limit is too low to keep descriptors for files.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    left = limit - _open_now()
    kept = min(KEPT_FOR_FILES, max(0, left) // 2)
    most = max(FEWEST, left - kept)
    sentence = "%d connections at most: of the %d file descriptors allowed, %d are kept for files"
    level = logging.DEBUG if kept == KEPT_FOR_FILES else logging.WARNING
    log.log(level, sentence, most, limit, kept)
    return most


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # no Linux
        return 64
