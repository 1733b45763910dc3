"""EIO and ENOSPC at the nth write, fsync or rename of a library: no acknowledged change is lost,
no failed one is half there. `make crash` does every n; `make test` a few."""

import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, random_adapter
from faulty_child import OPERATIONS, open_library, operate
from registry_model import Name

from adapters.format import adapter_bytes, parse_adapter
from model.checkpoint import read_backbone

EVERY = os.environ.get("FAULTS") == "all"
CALLS = {"write": 5, "pwrite64": 90, "fsync": 10, "fdatasync": 20, "rename": 5}
SHORT = [
    ("write", "ENOSPC", 2),
    ("pwrite64", "EIO", 20),
    ("pwrite64", "ENOSPC", 33),
    ("fsync", "EIO", 2),
    ("fdatasync", "EIO", 9),
    ("rename", "ENOSPC", 2),
]
POINTS = [
    (call, error, n)
    for call, most in CALLS.items()
    for error in ("EIO", "ENOSPC")
    for n in range(1, most + 1)
]

# Calls that a start and a load make to files of the data folder, and how many in all.
READS = {"openat": 60, "pread64": 40, "read": 24, "newfstatat": 60, "mmap": 12, "flock": 1}
READ_ERRORS = ("EMFILE", "EIO", "EACCES", "ENOMEM", "EINTR")
SHORT_READS = [("pread64", "EIO", 3), ("read", "EIO", 1)]  # at the start, and at a load
READ_POINTS = [
    (call, error, n)
    for call, most in READS.items()
    for error in READ_ERRORS
    for n in range(1, most + 1)
]

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, which makes system calls fail"
)


@pytest.fixture(scope="module")
def files(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    metadata = {"lora_alpha": "8.0", "base_digest": read_backbone(tiny_backbone).digest}
    paths = [tmp_path_factory.mktemp("files") / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(adapter_bytes(random_adapter(TINY, 700 + seed), metadata))
    return paths


def run_child(command: list[str | Path]) -> dict[str, str]:
    """The outcome of every operation that the child told of."""
    ours, theirs = socket.socketpair()
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    with ours, theirs:
        child = subprocess.Popen(command, stdin=theirs, env=environment, stderr=subprocess.PIPE)
        theirs.close()
        told = b"".join(iter(lambda: ours.recv(4096), b"")).decode()
        _, errors = child.communicate()
    if errors and b"ptrace" in errors.lower():
        pytest.skip("strace may not trace here")
    assert told.endswith("end\n"), errors.decode()[-2000:]
    return dict(line.split(": ", 1) for line in told.splitlines()[:-1])


def apply(names: dict[str, Name], operation: str, digests: list[str]) -> None:
    kind, name, *rest = operation.split()
    known = names[name]
    if kind == "put":
        known.put(digests[int(rest[0])])
    elif kind == "point" and int(rest[0]) in known.versions:
        known.point("stable", int(rest[0]))
    elif kind == "delete" and not rest:
        known.drop_all()
    elif kind == "delete" and int(rest[0]) in known.versions:
        known.drop(int(rest[0]))


def possible(outcomes: dict[str, str], digests: list[str]) -> list[dict[str, Name]]:
    """Every state that the outcomes leave: what failed may have happened, or not."""
    told = [operation for operation in OPERATIONS if operation in outcomes]
    choices = [[True] if outcomes[op] == "ok" else [True, False] for op in told]
    states = []
    for happened in itertools.product(*choices):
        names = {"a": Name(), "b": Name()}
        for operation, did in zip(told, happened, strict=True):
            if did:
                apply(names, operation, digests)
        states.append(names)
    return states


@pytest.mark.parametrize(("call", "error", "n"), POINTS if EVERY else SHORT)
def test_a_failing_disk_loses_nothing_acknowledged_and_keeps_no_half(
    tiny_backbone: Path, tmp_path: Path, files: list[Path], call: str, error: str, n: int
) -> None:
    child = [sys.executable, Path(__file__).parent / "faulty_child.py"]
    inject = f"inject={call}:error={error}:when={n}"
    trace = ["strace", "-f", "--seccomp-bpf", "-o", tmp_path / "trace", "-e", inject]
    folder = tmp_path / "data"
    outcomes = run_child([*trace, *child, folder, tiny_backbone, *files])
    # An operation on what a failed one would have made fails with NotFound, as it should.
    bad = {op: o for op, o in outcomes.items() if "unexpected" in o and "NotFound" not in o}
    assert not bad
    digests = [parse_adapter(bytearray(path.read_bytes())).digest for path in files]
    library = open_library(folder, tiny_backbone)
    try:
        found = {}
        for name in ("a", "b"):
            known = library.registry.page(limit=10)
            mine = next((named for named in known if named.name == name), None)
            versions = {v.number: v.digest for v in mine.versions} if mine else {}
            pointers = {p.alias: (p.number, p.generation) for p in mine.pointers} if mine else {}
            assert all(library.store.verify(digest) is None for digest in versions.values())
            found[name] = versions, pointers
        states = [
            {name: known.visible() for name, known in names.items()}
            for names in possible(outcomes, digests)
        ]
        assert found in states, (outcomes, found)
        live = {d for versions, _ in found.values() for d in versions.values()}
        on_disk = {f"sha256:{p.name}" for p in library.store.folder.iterdir() if p.is_file()}
        assert on_disk == live
    finally:
        library.close()


@pytest.fixture(scope="module")
def stored(
    tiny_backbone: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A data folder with the names a and b."""
    folder = tmp_path_factory.mktemp("stored") / "data"
    library = open_library(folder, tiny_backbone)
    try:
        for operation in ("put a 0", "put b 1"):
            operate(library, operation, [path.read_bytes() for path in files])
    finally:
        library.close()
    return folder


@pytest.mark.parametrize(("call", "error", "n"), READ_POINTS if EVERY else SHORT_READS)
def test_a_failing_read_is_no_damage_and_passes(
    tiny_backbone: Path, tmp_path: Path, stored: Path, call: str, error: str, n: int
) -> None:
    """The nth call on the data folder fails, at the start or at a load; the next one works."""
    folder = tmp_path / "data"
    shutil.copytree(stored, folder)
    child = [sys.executable, Path(__file__).parent / "reading_child.py"]
    paths = [folder, *folder.rglob("*")]
    watched = [part for path in paths for part in ("-P", str(path))]
    for extra in ("registry.sqlite-wal", "registry.sqlite-shm"):
        watched += ["-P", str(folder / extra)]
    inject = f"inject={call}:error={error}:when={n}"
    trace = ["strace", "-f", "--seccomp-bpf", "-o", tmp_path / "trace", *watched, "-e", inject]
    outcomes = run_child([*trace, *child, folder, tiny_backbone, "a", "b"])
    bad = {turn: told for turn, told in outcomes.items() if "unexpected" in told}
    assert not bad
    faults = [turn for turn, told in outcomes.items() if told != "ok"]
    # strace counts the calls of each thread: the start's own, and the loader's.
    assert len({turn.split()[0] for turn in faults}) == len(faults), outcomes
    assert faults or EVERY, "the call was not made: no fault was injected"
    assert all(outcomes[f"load again {name}"] == "ok" for name in "ab"), outcomes
    library = open_library(folder, tiny_backbone)
    try:
        assert library.registry.damaged() == set()
        assert [named.name for named in library.registry.page()] == ["a", "b"]
        assert not any(library.store.quarantine_folder.iterdir())
    finally:
        library.close()


def test_without_faults_every_operation_succeeds(
    tiny_backbone: Path, tmp_path: Path, files: list[Path]
) -> None:
    child = [sys.executable, Path(__file__).parent / "faulty_child.py"]
    outcomes = run_child([*child, tmp_path / "data", tiny_backbone, *files])
    assert set(outcomes.values()) == {"ok"}
