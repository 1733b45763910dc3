"""API keys: stored hashed, compared in constant time, reloaded when their file changes."""

import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adapters.folders import sync_folder
from server.key_patterns import pattern_fault
from server.keys_mark import note_keys, put_back

log = logging.getLogger("trunkline.keys")

Scope = Literal["infer", "admin", "metrics"]
SECONDS = {"s": 1, "m": 60, "h": 3600}
ROUNDING = 1e-6  # of a request or token: who waited as told must not be told to wait again
RELOAD_S = 1.0  # how often the file is looked at


class BadKeys(ValueError):
    """A keys file, or a wish for a key, that can't be, with the sentence for it."""


class Quota(BaseModel):
    """`count` every `seconds`; so many may also come at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1)
    seconds: int = Field(ge=1)

    @classmethod
    def parse(cls, text: str) -> "Quota":
        """100/s, 6000/m or 50000/h. Raises BadKeys."""
        match = re.fullmatch(r"([1-9][0-9]{0,11})/([smh])", text)
        if match is None:
            raise BadKeys(f"{text} is no quota: write 100/s, 6000/m or 50000/h")
        return cls(count=int(match[1]), seconds=SECONDS[match[2]])

    def __str__(self) -> str:
        units = {seconds: unit for unit, seconds in SECONDS.items()}
        return f"{self.count}/{units.get(self.seconds, f'{self.seconds}s')}"


class Key(BaseModel):
    """What is stored of a key: never its secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] = ()  # patterns of names; none: every adapter
    requests: Quota | None = None
    tokens: Quota | None = None
    created_at: float
    revoked_at: float | None = None

    @property
    def confined(self) -> bool:
        """Whether it may see and use some adapters only."""
        return bool(self.adapters)

    def may_use(self, adapter: str) -> bool:
        """Whether a pattern matches the name. Case does not count: a name that differs from another
        by case only is an error that mentions the other one, so its owner alone may get it."""
        name = adapter.lower()
        return not self.adapters or any(fnmatchcase(name, p) for p in self.adapters)


_KEYS = TypeAdapter(list[Key])


class Bucket:
    """What is left of a quota: it fills steadily, and may be overdrawn once by a large request."""

    def __init__(self, quota: Quota) -> None:
        self.quota, self.left, self.at = quota, float(quota.count), time.monotonic()

    def wait_s(self, cost: int = 0) -> int:
        """Whole seconds until `cost` is there, at least 1; 0 where it is there now."""
        now, rate = time.monotonic(), self.quota.count / self.quota.seconds
        self.left = min(self.quota.count, self.left + (now - self.at) * rate)
        self.at = now
        missing = cost - self.left - ROUNDING
        return max(1, math.ceil(missing / rate)) if missing > 0 else 0

    def full_s(self) -> float:
        """Seconds until all of the quota is there."""
        self.wait_s()
        return max(0.0, (self.quota.count - self.left) * self.quota.seconds / self.quota.count)

    def take(self, cost: int) -> None:
        self.left -= cost


@dataclass(frozen=True)
class QuotaWait:
    """A quota that is used up, and when it is there again."""

    of: Literal["requests", "tokens"]
    quota: Quota
    seconds: int


class Caller:
    """A live key with what is left of its quotas. Used on the event loop alone."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.requests = Bucket(key.requests) if key.requests else None
        self.tokens = Bucket(key.tokens) if key.tokens else None
        self.has_quota = bool(self.requests or self.tokens)

    def take_request(self) -> QuotaWait | None:
        """None, and one request is counted; or the quota to wait for longest."""
        waits = []
        if self.requests:
            waits.append(QuotaWait("requests", self.requests.quota, self.requests.wait_s(1)))
        if self.tokens:
            waits.append(QuotaWait("tokens", self.tokens.quota, self.tokens.wait_s()))
        longest = max(waits, key=lambda wait: wait.seconds, default=None)
        if longest is not None and longest.seconds:
            return longest
        if self.requests:
            self.requests.take(1)
        return None

    def take_tokens(self, tokens: int) -> None:
        """Counted once a request's tokens are known; a debt delays the key's next requests."""
        if self.tokens:
            self.tokens.take(tokens)

    def give_back_tokens(self, tokens: int) -> None:
        """They were not run."""
        if self.tokens:
            self.tokens.take(-tokens)


class KeyRing:
    """The keys of one file, as last read whole. No file: none were ever made, the server is open.

    A file that turns unreadable or goes away changes nothing: the keys of before stay in force.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._callers: dict[str, Caller] = {}
        self._seen: tuple[int, int, int] | None = None
        self._looked = time.monotonic()
        self.configured = False
        if path.exists():
            self._load()

    def names(self) -> dict[str, str]:
        """The live keys' names by id."""
        return {identity: caller.key.name for identity, caller in self._callers.items()}

    def caller_of(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller | None:
        """Whose request it is, by its headers in lower case; None without a live key."""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                return self.caller(value[7:].strip())
            if name == b"x-api-key":
                return self.caller(value)
        return None

    def caller(self, secret: bytes) -> Caller | None:
        """Whose secret this is. The secret itself is compared in constant time, by its hash."""
        digest = hashlib.sha256(secret).hexdigest()
        parts = secret.decode("ascii", "replace").split("_", 2)
        caller = self._callers.get(parts[1]) if len(parts) == 3 else None
        stored = caller.key.sha256 if caller else "0" * 64
        return caller if hmac.compare_digest(stored, digest) else None

    def refresh(self) -> None:
        """Read the file again where it has changed: one `stat` a second, and only then."""
        now = time.monotonic()
        if now - self._looked < RELOAD_S:
            return
        self._looked = now
        try:
            if self._stamp() != self._seen:
                self._load()
        except FileNotFoundError:
            return
        except (BadKeys, OSError) as error:
            log.error("the keys of before stay in force: %s", error)

    def _stamp(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _load(self) -> None:
        stamp = self._stamp()
        self._seen = stamp  # a broken file is told of once, not every second
        keys = read_keys(self.path)
        before = self._callers
        self._callers = {
            key.id: before[key.id]
            if key.id in before and before[key.id].key == key
            else Caller(key)
            for key in keys
            if key.revoked_at is None
        }
        self.configured = self.configured or bool(keys)


def read_keys(path: Path) -> list[Key]:
    """Raises BadKeys."""
    try:
        if path.exists() and not path.is_file():
            raise BadKeys(f"keys file {path}: it is not a plain file")
        return _KEYS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a list of keys"
        raise BadKeys(
            f"keys file {path}: {why}; {put_back(path)}, or move it away and make keys with "
            f"`trunkline keys --file {path} new`"
        ) from error


def new_key(path: Path, name: str, **wishes: Any) -> tuple[Key, str]:
    """Add a key to the file; the key and its secret, which is stored nowhere. Raises BadKeys."""
    for pattern in wishes.get("adapters", ()):
        fault = pattern_fault(pattern)
        if fault is not None:
            raise BadKeys(fault)
    identity = secrets.token_hex(6)
    secret = f"tl_{identity}_{secrets.token_urlsafe(32)}"
    try:
        # 256 random bits can't be guessed, so one round of SHA-256 keeps them: no slow hash.
        sha256 = hashlib.sha256(secret.encode()).hexdigest()
        key = Key(id=identity, name=name, sha256=sha256, created_at=time.time(), **wishes)
    except ValidationError as error:
        raise BadKeys(str(error.errors()[0]["msg"])) from error
    with _changing(path) as keys:
        keys.append(key)
    return key, secret


def revoke_key(path: Path, identity: str) -> Key:
    """Raises BadKeys where no live key has this id."""
    with _changing(path) as keys:
        for index, key in enumerate(keys):
            if key.id == identity and key.revoked_at is None:
                keys[index] = key.model_copy(update={"revoked_at": time.time()})
                return keys[index]
        raise BadKeys(f"no live key has the id {identity}")


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The file's keys, written back whole by one rename; one process at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read_keys(path)
            yield keys
            _replace(path, keys)
            note_keys(path)
    except OSError as error:
        raise BadKeys(f"keys file {path}: {error.strerror}") from error


def _replace(path: Path, keys: list[Key]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps([key.model_dump(mode="json") for key in keys], indent=1)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)  # else a power cut could bring a revoked key back
