"""An acknowledged upload keeps its file in every order in which uploads, failing uploads, deletes
and the ends of requests can meet, and whatever the point at which the process is killed.

`make races` takes three operations at a time, and looks at the folder at every point of them.
"""

import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from schedules import Operation, Schedule, every_schedule, scheduled
from test_library_states import adapter_file, backbone, encoder, make_pool

from adapters.collector import Collector
from adapters.conditions import MUST_BE_NEW, UNCONDITIONAL, Condition
from adapters.errors import Conflict, NotFound, StorageFull
from adapters.format import AdapterSet
from adapters.library import Library, Upload
from adapters.registry import Registry
from adapters.versions import Record

EVERY = os.environ.get("RACES") == "all"
SHM = Path("/dev/shm")  # a copy of the folder at every point is not for a disk


def open_library(folder: Path) -> Library:
    return Library(folder, backbone(), encoder(), make_pool)


def publish(library: Library, name: str, seed: int, condition: Condition = UNCONDITIONAL) -> str:
    incoming = library.store.incoming()
    try:
        incoming.write(adapter_file(seed))
        upload = Upload(name, "test", condition=condition)
        return library.publish(upload, incoming)[0].digest
    finally:
        incoming.discard()


class Race:
    """A library that has `taken` with the bytes 3, and operations that all mean these bytes."""

    def __init__(self, library: Library, schedule: Schedule) -> None:
        self.library, self.schedule = library, schedule
        self.acknowledged: dict[str, str] = {"taken": library.version("taken").digest}
        self.doubtful: set[str] = set()  # names with an operation under way

    def put(self) -> None:
        self.doubtful.add("new")
        self.acknowledged["new"] = publish(self.library, "new", 3)

    def put_again(self) -> None:
        self.acknowledged["other"] = publish(self.library, "other", 3)

    def put_with_a_condition_that_fails(self) -> None:
        try:
            digest = publish(self.library, "taken", 3, MUST_BE_NEW)
        except Conflict:
            return
        assert "taken" not in self.acknowledged  # after the delete it holds
        self.acknowledged["taken"] = digest

    def put_on_a_full_disk(self) -> None:
        """The file has its name in the store when the row is refused."""
        with pytest.raises(StorageFull):
            publish(self.library, "full", 3)

    def put_bytes_of_its_own_on_a_full_disk(self) -> None:
        with pytest.raises(StorageFull):
            publish(self.library, "full", 4)

    def put_these_bytes_too(self) -> None:
        self.acknowledged["four"] = publish(self.library, "four", 4)

    def delete(self) -> None:
        del self.acknowledged["taken"]
        self.doubtful.add("taken")
        self.library.remove("taken", None, "test")

    def use(self) -> None:
        """A request under way keeps its file until its end."""
        try:
            version, lease = self.library.lease("taken")
        except NotFound:
            return
        self.schedule.point("leased")
        assert self.library.store.verify(version.digest) is None
        lease.release()


OPERATIONS: list[Callable[[Race], None]] = [
    Race.put,
    Race.put_again,
    Race.put_with_a_condition_that_fails,
    Race.put_on_a_full_disk,
    Race.put_bytes_of_its_own_on_a_full_disk,
    Race.put_these_bytes_too,
    Race.delete,
    Race.use,
]
PAIRS = [
    [Race.put_bytes_of_its_own_on_a_full_disk, Race.put_these_bytes_too],
    [Race.put_with_a_condition_that_fails, Race.delete],
    [Race.use, Race.delete],
]
TRIPLES = [list(three) for three in itertools.combinations(OPERATIONS, 3)]


@pytest.fixture
def late_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions fail within the transaction alone, and no row of the name `full` can be added."""
    add, check_upload = Registry.add, Library.check_upload

    def full(self: Registry, connection, name: str, *arguments, **options):
        if name == "full":
            raise StorageFull("the disk is full; nothing was stored")
        return add(self, connection, name, *arguments, **options)

    def late(self: Library, upload: Upload) -> None:
        if upload.condition is UNCONDITIONAL:
            check_upload(self, upload)

    monkeypatch.setattr(Registry, "add", full)
    monkeypatch.setattr(Library, "check_upload", late)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With `taken` in it; copied for each schedule."""
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as parent:
        library = open_library(Path(parent) / "first")
        publish(library, "taken", 3)
        library.close()
        yield Path(parent) / "first"


@pytest.fixture(scope="module", autouse=True)
def examined_once() -> Iterator[None]:
    """Validation and probe of the same bytes are of no interest here, and are done once."""
    examine, known = Library._examine, {}

    def once(self: Library, upload: Upload, adapter: AdapterSet) -> Record:
        if adapter.digest not in known:
            known[adapter.digest] = examine(self, upload, adapter)
        return known[adapter.digest]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "_examine", once)
        yield


def assert_sound(library: Library, acknowledged: dict[str, str], doubtful: set[str]) -> None:
    for name, digest in acknowledged.items():
        assert library.version(name).digest == digest
        assert library.store.verify(digest) is None
    named = {f"{digest}" for digest in library.registry.blobs()}
    assert {f"sha256:{entry.name}" for entry in library.store.entries()} == named
    live = {v.digest for each in library.registry.page() for v in each.versions}
    assert named == live
    assert {each.name for each in library.registry.page()} <= set(acknowledged) | doubtful


def race(
    folder: Path, operations: list[Callable[[Race], None]], choices: list[int], kills: bool
) -> list[tuple[int, int]]:
    """One schedule; with `kills` the folder is started from as it is at every point."""
    work = folder.with_name("work")
    shutil.copytree(folder, work)
    library = open_library(work)

    def killed_here(point: str) -> None:
        # What is acknowledged is there; what is under way may be there or not.
        if kills:
            copy = folder.with_name("killed")
            shutil.copytree(work, copy)
            again = open_library(copy)
            again._housekeeper.submit(lambda: None).result()
            assert_sound(again, race.acknowledged, race.doubtful | {"new", "other", "four"})
            again.close()
            shutil.rmtree(copy)

    schedule = Schedule(choices, killed_here)
    race = Race(library, schedule)
    bound: list[Operation] = [lambda op=op: op(race) for op in operations]
    with scheduled(library, schedule):
        schedule.run(bound)
    assert not schedule.errors, (schedule.trace, schedule.errors)
    assert_sound(library, race.acknowledged, set())
    assert not any(library.store.incoming_folder.iterdir())
    assert not any(library.store.quarantine_folder.iterdir())
    library.close()
    shutil.rmtree(work)
    return schedule.trace


def named(operations: list[Callable[[Race], None]]) -> str:
    return "-".join(operation.__name__ for operation in operations)


@pytest.mark.usefixtures("late_faults")
@pytest.mark.parametrize("operations", TRIPLES if EVERY else PAIRS, ids=named)
def test_every_order_of_operations_keeps_what_is_acknowledged(
    folder: Path, operations: list[Callable[[Race], None]]
) -> None:
    count = every_schedule(lambda choices: race(folder, operations, choices, kills=False))
    assert count > 1
    print(f"{count} orders of {named(operations)}")


@pytest.mark.usefixtures("late_faults")
@pytest.mark.parametrize(
    "operations",
    [list(two) for two in itertools.combinations(OPERATIONS, 2)]
    if EVERY
    else [[Race.put_bytes_of_its_own_on_a_full_disk], [Race.delete], [Race.put_these_bytes_too]],
    ids=named,
)
def test_a_kill_at_any_point_of_any_order_keeps_what_is_acknowledged(
    folder: Path, operations: list[Callable[[Race], None]]
) -> None:
    every_schedule(lambda choices: race(folder, operations, choices, kills=True))


@pytest.mark.usefixtures("late_faults")
def test_the_search_finds_an_unlink_outside_of_the_transaction(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that there once was: look for a row, then unlink."""

    def careless(self: Collector, incoming) -> None:
        with self._registry.writing():
            named = self._registry.has_blob(incoming.digest)
        if not named:
            self._store.unlink(incoming.digest)

    monkeypatch.setattr(Collector, "take_back", careless)
    operations = [Race.put_bytes_of_its_own_on_a_full_disk, Race.put_these_bytes_too]
    with pytest.raises(AssertionError, match="gone"):
        every_schedule(lambda choices: race(folder, operations, choices, kills=False))


@pytest.mark.usefixtures("late_faults")
def test_a_failed_upload_that_can_t_be_taken_back_keeps_no_start_from_serving(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the error is: the file must not look like one whose row the registry has lost."""

    def broken(self: Registry) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    work = tmp_path / "work"
    shutil.copytree(folder, work)
    library = open_library(work)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "supersede", broken)
        with pytest.raises(StorageFull):
            publish(library, "full", 4)
    library.close()
    again = open_library(work)
    assert_sound(again, {"taken": again.version("taken").digest}, set())
    assert len(list(again.store.quarantine_folder.iterdir())) == 1
    again.close()
