"""Whether a stored file is what its digest says. Damage is a wrong digest or a missing file."""

import errno
import hashlib
import os
import stat
from pathlib import Path


def fault_of(path: Path, digest: str) -> str | None:
    """What is wrong with the file, or None.

    Raises OSError where it can't be read now, which says nothing about its bytes.
    """
    try:
        found = file_digest(path)
    except FileNotFoundError:
        return "it is gone"
    if found is None:
        return "not a plain file"
    return None if found == digest else "its bytes are not those of its digest"


def file_digest(path: Path) -> str | None:
    """The digest of a plain file, None of anything else. Raises OSError."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
