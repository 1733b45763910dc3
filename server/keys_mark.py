"""keys.mark beside the keys file: it shows that there were keys, should that file be lost.

Without it a server that finds no keys file would be open to everybody, as a new one is.
"""

import logging
from pathlib import Path

log = logging.getLogger("trunkline.keys")


def keys_mark(keys: Path) -> Path:
    return keys.with_suffix(".mark")


def note_keys(keys: Path) -> None:
    """Make the mark. A disk that takes no writes is logged: the keys are in force all the same."""
    if keys_mark(keys).exists():
        return
    try:
        keys_mark(keys).touch()
    except OSError as error:
        log.warning("%s can't be written: %s", keys_mark(keys), error.strerror)


def lost_keys(keys: Path) -> str | None:
    """The sentence for keys that were there once, None where there never were any."""
    if not keys_mark(keys).exists():
        return None
    return (
        f"{keys} is missing or has no key, but {keys_mark(keys).name} beside it shows that there "
        f"were keys: {put_back(keys)}, make a key with "
        f"`trunkline keys --file {keys} new`, or give --insecure to serve without keys"
    )


def put_back(keys: Path) -> str:
    """How a keys file comes back from a backup, which has it as keys.json."""
    if keys.name != "keys.json":
        return "put it back (a backup has it as keys.json)"
    return f"put it back (`trunkline restore --only-keys BACKUP {keys.parent}` does)"
