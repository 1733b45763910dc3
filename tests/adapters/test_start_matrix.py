"""Every file of a data folder missing, empty, cut, flipped, unreadable or a folder: a start deletes
nothing, and serves everything that is sound or says one sentence. So does the start after it.

START_MATRIX=all (`make races`) does every fault; START_MATRIX_REPORT=FILE writes the table of
docs/promises.md.
"""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from start_faults import COLUMNS, ROWS, Fault, Row, unreadable
from test_library_states import adapter_file, backbone, encoder, make_pool

from adapters.errors import Damaged, RegistryLost, TrunklineError
from adapters.library import Library, Upload
from adapters.recovery import accept_loss, examine

EVERY = os.environ.get("START_MATRIX") == "all"
REPORT = os.environ.get("START_MATRIX_REPORT")
NOBODY = 65534
SHM = Path("/dev/shm")


def open_library(folder: Path) -> Library:
    return Library(folder, backbone(), encoder(), make_pool)


def put(library: Library, name: str, seed: int) -> None:
    incoming = library.store.incoming()
    try:
        incoming.write(adapter_file(seed))
        library.publish(Upload(name, "test"), incoming)
    finally:
        incoming.discard()


@pytest.fixture(scope="module")
def killed() -> Iterator[Path]:
    """A folder as a kill leaves it, with a log of changes, half an upload and a file put away.

    Half of the changes are in registry.sqlite, the others in its log alone.
    """
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as parent:
        Path(parent).chmod(0o755)
        work, folder = Path(parent) / "work", Path(parent) / "killed"
        library = open_library(work)
        for name, seed in (("a", 0), ("a", 1), ("b", 2)):
            put(library, name, seed)
        library.close()
        library = open_library(work)
        put(library, "acme/c", 3)
        library.registry.point("a", "stable", 1, "test")
        put(library, "gone", 4)
        library.remove("gone", None, "test")
        (work / "blobs" / "incoming" / "half").write_bytes(b"half an upload")
        (work / "blobs" / "quarantine" / "old").write_bytes(b"put away before")
        shutil.copytree(work, folder)
        library.close()
        shutil.copytree(work, folder.with_name("stopped"))
        yield folder


State = dict[str, tuple[dict[int, str], dict[str, tuple[int | None, int]]]]


def state_of(library: Library) -> State:
    return {
        each.name: (
            {version.number: version.digest for version in each.versions},
            {pointer.alias: (pointer.number, pointer.generation) for pointer in each.pointers},
        )
        for each in library.registry.page()
    }


@pytest.fixture(scope="module")
def acknowledged(killed: Path) -> State:
    copy = killed.with_name("sound")
    shutil.copytree(killed, copy)
    library = open_library(copy)
    state = state_of(library)
    library.close()
    assert set(state) == {"a", "acme/c", "b"}
    assert state["a"][1]["stable"] == (1, 1)
    return state


@contextmanager
def without_privileges(folder: Path, wanted: bool) -> Iterator[None]:
    """As a user whom the modes of files bind: root is not."""
    if not wanted or os.geteuid() != 0:
        yield
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def contents(folder: Path) -> Counter[str]:
    """The digests of all files but uploads under way, which a start clears, and `-shm`: no data,
    an index of the log that every reader may make again."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    kept = [p for p in files if p.parent.name != "incoming" and not p.name.endswith("-shm")]
    return Counter(digest_of(path) for path in kept)


def digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except PermissionError:
        return f"unreadable, {path.stat().st_size} bytes"


def start(folder: Path, expected: State) -> str:
    """What a start did, in the words of the table; all its promises are checked."""
    before = contents(folder)
    try:
        library = open_library(folder)
    except TrunklineError as refusal:
        error = refusal
    else:
        return what_it_serves(library, folder, expected)
    assert contents(folder) >= before
    assert str(folder) in error.message
    assert "\n" not in error.message
    if isinstance(error, RegistryLost):
        assert "trunkline restore BACKUP" in error.message
    return f"refuses ({error.code})"


def what_it_serves(library: Library, folder: Path, expected: State) -> str:
    try:
        library._housekeeper.submit(lambda: None).result()
        assert state_of(library) == expected
        damaged = [each for each in references(expected) if not served(library, each)]
        assert not any(path.is_file() for path in library.store.incoming_folder.iterdir())
    finally:
        library.close()
    return f"serves all but {len(damaged)}" if damaged else "serves all"


def references(state: State) -> list[tuple[str, str]]:
    return [
        (f"{name}@{number}", digest)
        for name, (versions, _) in state.items()
        for number, digest in versions.items()
    ]


def served(library: Library, reference: tuple[str, str]) -> bool:
    """Whether it is served with its own bytes; if not its file must be damaged or unreadable."""
    name, digest = reference
    try:
        assert library.version(name).digest == digest
        assert library.store.read(digest).digest == digest
        return True
    except (Damaged, TrunklineError):
        assert library.store.verify(digest) is not None
        return False


def cases() -> list[tuple[Row, str, int]]:
    rows = [(row, kind) for row in ROWS for kind in row.kinds]
    if EVERY:
        return [(row, kind, n) for row, kind in rows for n in range(len(row.kinds[kind]))]
    return [(row, kind, len(row.kinds[kind]) // 2) for row, kind in rows][::2]


OUTCOMES: dict[tuple[str, str], Counter[str]] = {}


@pytest.mark.parametrize(
    ("row", "kind", "number"), cases(), ids=lambda v: v.name if isinstance(v, Row) else str(v)
)
def test_a_start_deletes_nothing_and_serves_what_is_sound(
    killed: Path, acknowledged: State, row: Row, kind: str, number: int
) -> None:
    folder = killed.with_name("broken")
    shutil.copytree(killed.with_name("stopped") if row.is_stopped else killed, folder)
    fault: Fault = row.kinds[kind][number]
    try:
        fault(sorted(folder.glob(row.path))[0])
        before = contents(folder / "blobs")
        with without_privileges(folder, fault is unreadable):
            outcome = start(folder, acknowledged)
            assert start(folder, acknowledged) == outcome
        assert contents(folder / "blobs") >= before
        OUTCOMES.setdefault((row.name, kind), Counter())[outcome] += 1
        if outcome == "refuses (registry_lost)" and fault is not unreadable:
            recover(folder, acknowledged)
    finally:
        readable(folder)
        shutil.rmtree(folder)


def recover(folder: Path, acknowledged: State) -> None:
    """Without a backup: nothing is deleted, a sound file is served or in quarantine."""
    before = contents(folder)
    assert not examine(folder).is_fit_to_serve
    assert accept_loss(folder)
    assert contents(folder) >= before
    assert examine(folder).is_fit_to_serve
    library = open_library(folder)
    try:
        kept = {path.name[:64] for path in library.store.quarantine_folder.iterdir()}
        kept |= {path.name for path in library.store.entries()}
        on_disk = {digest.removeprefix("sha256:") for _, digest in references(acknowledged)}
        assert kept >= on_disk
        for reference in references(state_of(library)):
            served(library, reference)  # or its file is missing: a delete of it was lost
        put(library, "after", 5)
    finally:
        library.close()
    open_library(folder).close()


def readable(folder: Path) -> None:
    folder.chmod(0o755)
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            (Path(parent) / name).chmod(0o755)


def test_the_table_of_outcomes_is_as_documented() -> None:
    """Runs last in this file."""
    if not REPORT:
        return
    lines = ["| file | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for row in ROWS:
        cells = [OUTCOMES.get((row.name, kind), Counter()) for kind in COLUMNS]
        texts = ["; ".join(f"{o} ({n})" if len(c) > 1 else o for o, n in c.items()) for c in cells]
        lines.append("| " + " | ".join([row.name, *(text or "-" for text in texts)]) + " |")
    Path(REPORT).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["registry.sqlite", "registry.sqlite-shm", "registry.mark"])
def test_a_pipe_in_place_of_a_file_is_a_sentence_and_not_waited_for(
    killed: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(killed, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(RegistryLost, match="it is not a plain file"):
        open_library(folder)
