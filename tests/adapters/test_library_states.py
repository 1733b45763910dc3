"""The library against a simple model of it: any order of operations, restarts among them."""

import itertools
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_adapter, random_gpt, tiny_tokenizer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)
from registry_model import CURRENT, Name

from adapters.conditions import UNCONDITIONAL, exactly
from adapters.errors import (
    Conflict,
    Damaged,
    Invalid,
    NoEffect,
    NotFound,
    PoolFull,
    TrunklineError,
    VersionNotFound,
)
from adapters.format import AdapterSet, adapter_bytes
from adapters.leases import Lease
from adapters.library import Library, Upload
from adapters.slots import SlotPool
from adapters.versions import Version
from adapters.weights import placed_bytes
from model.checkpoint import Backbone, backbone_digest, backbone_tensors
from model.encoder import Encoder

EXAMPLES = int(os.environ.get("STATE_EXAMPLES", "15"))
STEPS = int(os.environ.get("STATE_STEPS", "40"))

NAMES = st.sampled_from(["a", "b", "acme/c"])
ALIASES = st.sampled_from([CURRENT, "stable", "canary"])
FILES = 6
SLOTS = 3


@lru_cache
def backbone() -> Backbone:
    tensors = backbone_tensors(TINY, random_gpt(TINY).state_dict())
    return Backbone("tiny", TINY, tensors, tiny_tokenizer(), None, backbone_digest(TINY, tensors))


@lru_cache
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return Encoder(TINY, backbone().tensors)


@lru_cache
def adapter_file(seed: int) -> bytes:
    metadata = {"lora_alpha": "8.0", "base_digest": backbone().digest}
    return adapter_bytes(random_adapter(TINY, seed), metadata)


def make_pool(read) -> SlotPool:
    tensors = random_adapter(TINY, 0)
    size = placed_bytes(AdapterSet(tensors, {"lora_alpha": "8.0"}, ""), torch.float32)
    return SlotPool(
        TINY,
        torch.float32,
        torch.device("cpu"),
        capacity_bytes=size * SLOTS,
        max_slots=0,
        read=read,
        debug=True,
    )


class LibraryStates(RuleBasedStateMachine):
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="library-"))
        self.names: dict[str, Name] = {}
        self.held: dict[Lease, Version] = {}
        self.pinned: dict[tuple[str, int], str] = {}  # name and number -> digest
        self.open()

    def open(self) -> None:
        self.library = Library(self.folder, backbone(), encoder(), make_pool)

    def upload(self, name: str, data: bytes, **options) -> tuple[Version, bool]:
        incoming = self.library.store.incoming()
        try:
            incoming.write(data)
            return self.library.publish(Upload(name, "test", **options), incoming)
        finally:
            incoming.discard()

    def settle(self) -> None:
        """Wait for the housekeeper and the loader to have nothing left to do."""
        self.library._housekeeper.submit(lambda: None).result()
        pool = self.library.slots
        with pool._cond:
            assert pool._cond.wait_for(lambda: not pool._wanted and not pool._loading, 20)

    def teardown(self) -> None:
        for lease in self.held:
            lease.release()
        self.settle()
        stats = self.library.slots.stats()
        assert self.library.leases.total == stats.held == stats.leaving == 0
        self.library.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(name=NAMES, seed=st.integers(0, FILES - 1), activate=st.booleans())
    def put(self, name: str, seed: int, activate: bool) -> None:
        version, is_new = self.upload(name, adapter_file(seed), activate=activate)
        known = self.names.setdefault(name, Name())
        assert (version.number, is_new) == known.put(version.digest, activate)

    @rule(name=NAMES, seed=st.integers(0, FILES - 1), number=st.integers(0, 5))
    def put_if_match(self, name: str, seed: int, number: int) -> None:
        known = self.names.get(name, Name())
        if known.pointers.get(CURRENT, -1) == number:
            self.put_matching(name, seed, number)
            return
        with pytest.raises(Conflict):
            self.upload(name, adapter_file(seed), condition=exactly(number))

    def put_matching(self, name: str, seed: int, number: int) -> None:
        version, is_new = self.upload(name, adapter_file(seed), condition=exactly(number))
        assert (version.number, is_new) == self.names[name].put(version.digest)

    @rule(name=NAMES, cut=st.integers(1, 100))
    def put_broken(self, name: str, cut: int) -> None:
        with pytest.raises(Invalid):
            self.upload(name, adapter_file(0)[:-cut])

    @rule(name=NAMES, alias=ALIASES, number=st.integers(1, 6), data=st.data())
    def promote(self, name: str, alias: str, number: int, data: st.DataObject) -> None:
        known = self.names.get(name, Name())
        generation = known.generations.get(alias, 0)
        if_match = data.draw(st.sampled_from([None, generation, generation + 1]))
        point = self.library.registry.point
        condition = UNCONDITIONAL if if_match is None else exactly(if_match)
        if number not in known.versions:
            with pytest.raises(NotFound):
                point(name, alias, number, "test", condition)
        elif if_match == generation + 1:
            with pytest.raises(Conflict):
                point(name, alias, number, "test", condition)
        else:
            pointer = point(name, alias, number, "test", condition)
            known.point(alias, number)
            assert pointer.generation == known.generations[alias]

    @rule(name=NAMES, number=st.none() | st.integers(1, 6))
    def delete(self, name: str, number: int | None) -> None:
        known = self.names.get(name, Name())
        doomed = list(known.versions) if number is None else [number]
        if not known.versions or not set(doomed) <= set(known.versions):
            with pytest.raises(NotFound):
                self.library.remove(name, number, "test")
            return
        in_flight = self.library.remove(name, number, "test")
        users = [v for v in self.held.values() if v.name == name and v.number in doomed]
        assert in_flight == len(users)
        for each in doomed:
            known.drop(each)
            self.pinned.pop((name, each), None)
        self.settle()

    @rule(target=leases, name=NAMES, suffix=st.sampled_from(["", "@1", "@2", "@stable"]))
    def lease(self, name: str, suffix: str) -> object:
        try:
            expected = self.expected(name + suffix)
            version, lease = self.library.lease(name + suffix)
        except NotFound:
            assert self.expected(name + suffix) is None
            return multiple()
        assert version.digest == expected
        self.held[lease] = version
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        if lease in self.held:
            lease.release()
            del self.held[lease]

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        if self.expected(name) is None:
            with pytest.raises(NotFound):
                self.library.load(name, 10)
            return
        version, done = self.library.load(name, 10)
        assert done
        assert version.digest == self.expected(name)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        digest = self.expected(name)
        if digest is None:
            return
        version, in_flight = self.library.unload(name, "test")
        self.pinned.pop((name, version.number), None)
        assert in_flight == sum(v == version for v in self.held.values())
        self.settle()
        if not in_flight:
            assert not self.library.residency.place(version).resident

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        digest = self.expected(name)
        if digest is None:
            return
        try:
            version = self.library.pin(name, "test")
            self.pinned[name, version.number] = digest
        except PoolFull:
            assert len({*self.pinned.values()} - {digest}) >= SLOTS // 2

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        digest = self.expected(name)
        if digest is not None:
            version = self.library.unpin(name, "test")
            self.pinned.pop((name, version.number), None)

    @precondition(lambda self: not self.held)
    @rule()
    def restart(self) -> None:
        self.library.close()
        self.open()

    @rule()
    def restart_after_a_crash(self) -> None:
        """As a kill leaves it: no lease is released, no drain ends."""
        self.held.clear()
        crashed, self.library = self.library, None
        crashed._housekeeper.shutdown()
        crashed.slots.close()
        crashed.registry.close()
        os.close(crashed._folder.lock)
        (self.folder / "blobs" / "incoming" / "half").write_bytes(b"half an upload")
        self.open()
        assert not any((self.folder / "blobs" / "incoming").iterdir())

    def expected(self, reference: str) -> str | None:
        """The digest that a reference must mean."""
        name, _, rest = reference.partition("@")
        known = self.names.get(name, Name())
        number = int(rest) if rest.isdigit() else known.pointers.get(rest or CURRENT)
        return known.versions.get(number) if number else None

    @invariant()
    def the_registry_says_what_the_model_says(self) -> None:
        for name, known in self.names.items():
            for suffix in ("", "@stable", "@canary", "@1", "@2", "@3"):
                try:
                    found = self.library.registry.resolve(name + suffix).digest
                except (NotFound, VersionNotFound):
                    found = None
                assert found == self.expected(name + suffix)
            generations = {
                alias: self.library.registry._pointer(name, alias).generation
                for alias in known.generations
            }
            assert generations == known.generations  # the model's only grow

    @invariant()
    def what_is_visible_is_on_the_disk_under_its_digest(self) -> None:
        live = {d for known in self.names.values() for d in known.versions.values()}
        held = {version.digest for version in self.held.values()}
        for digest in live | held:
            assert self.library.store.verify(digest) is None
        on_disk = {f"sha256:{path.name}" for path in self.library.store.entries()}
        assert on_disk <= live | held

    @invariant()
    def leases_are_those_taken(self) -> None:
        assert self.library.leases.total == len(self.held)

    @invariant()
    def slots_stay_within_the_pool(self) -> None:
        self.settle()
        stats = self.library.slots.stats()
        assert stats.resident + stats.leaving <= SLOTS
        assert stats.used_bytes * SLOTS == (stats.resident + stats.leaving) * stats.capacity_bytes

    @invariant()
    def pins_are_those_asked_for_by_name_and_their_bytes_stay(self) -> None:
        self.settle()
        for name, known in self.names.items():
            for number in known.versions:
                place = self.library.residency.place(self.library.version(f"{name}@{number}"))
                pinned = (name, number) in self.pinned
                assert (place.pinned, place.pin_held) == (pinned, pinned)
        assert {d for d in self.pinned.values() if self.library.slots.is_resident(d)} == {
            *self.pinned.values()
        }


TestLibraryStates = pytest.mark.filterwarnings("ignore::ResourceWarning")(LibraryStates.TestCase)
TestLibraryStates.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_second_process_is_refused_the_folder(tmp_path: Path) -> None:
    first = Library(tmp_path, backbone(), encoder(), make_pool)
    with pytest.raises(TrunklineError, match="another server uses"):
        Library(tmp_path, backbone(), encoder(), make_pool)
    first.close()
    Library(tmp_path, backbone(), encoder(), make_pool).close()


def test_seeding_brings_each_file_once_and_never_undoes_what_was_done_since(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    for name, seed in (("a", 0), ("acme/b", 1)):
        path = seeds / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(adapter_file(seed))
    library = Library(tmp_path / "data", backbone(), encoder(), make_pool)
    library.seed(seeds)
    library.seed(seeds)
    registry = library.registry
    assert [named.name for named in registry.page()] == ["a", "acme/b"]
    (seeds / "a.safetensors").write_bytes(adapter_file(2))
    library.seed(seeds)
    assert registry.resolve("a").number == 2
    registry.point("a", CURRENT, 1, "test")
    library.remove("acme/b", None, "test")
    library.seed(seeds)
    assert registry.resolve("a").number == 1
    assert not registry.exists("acme/b")
    library.close()


def test_ids_of_deleted_versions_are_never_given_again(tmp_path: Path) -> None:
    library = Library(tmp_path, backbone(), encoder(), make_pool)
    numbers = []
    for seed in itertools.islice(itertools.cycle(range(3)), 6):
        incoming = library.store.incoming()
        incoming.write(adapter_file(seed))
        version, _ = library.publish(Upload("a", "test"), incoming)
        incoming.discard()
        numbers.append(version.number)
        library.remove("a", None, "test")
    assert numbers == [1, 2, 3, 4, 5, 6]
    library.close()


def put(library: Library, name: str, data: bytes) -> Version:
    incoming = library.store.incoming()
    try:
        incoming.write(data)
        return library.publish(Upload(name, "test"), incoming)[0]
    finally:
        incoming.discard()


def test_a_calibration_table_alone_is_an_effect(tmp_path: Path) -> None:
    library = Library(tmp_path, backbone(), encoder(), make_pool)
    table = {"calibration": torch.linspace(0, 1, 100)}
    version = put(library, "calibrated", adapter_bytes(table, {"lora_alpha": "1.0"}))
    assert version.manifest.calibration
    library.close()


@pytest.mark.parametrize("part", ["sequence", "cls"])
def test_a_sequence_head_or_a_cls_embedding_alone_is_an_effect(tmp_path: Path, part: str) -> None:
    """Both show only in rows that begin with [CLS]; a copy of the trunk's own changes nothing."""
    library = Library(tmp_path, backbone(), encoder(), make_pool)
    own = random_adapter(TINY, 1, ranks={}, **{part: True})
    version = put(library, "scorer", adapter_bytes(own, {"lora_alpha": "1.0"}))
    assert version.record.probe_delta > 0.01
    assert (version.manifest.sequence_head, version.manifest.cls_embedding) == (
        part == "sequence",
        part == "cls",
    )
    copies = adapter_bytes({n: backbone().tensors[n] for n in own}, {"lora_alpha": "1.0"})
    with pytest.raises(NoEffect):
        put(library, "copy", copies)
    library.close()


def test_a_damaged_file_is_put_away_at_its_load_and_mended_by_the_same_bytes(
    tmp_path: Path,
) -> None:
    library = Library(tmp_path, backbone(), encoder(), make_pool)
    version = put(library, "a", adapter_file(0))
    path = library.store.path(version.digest)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(Damaged):
        library.load("a", 10)
    with pytest.raises(Damaged):
        library.lease("a")
    assert [each.name.startswith(path.name) for each in library.store.quarantine_folder.iterdir()]
    assert put(library, "a", adapter_file(0)) == version
    assert library.load("a", 10) == (version, True)  # at once: the failure is forgotten
    library.close()


def test_a_pin_after_an_unload_stays_when_the_requests_of_before_are_answered(
    tmp_path: Path,
) -> None:
    library = Library(tmp_path, backbone(), encoder(), make_pool)
    version = put(library, "a", adapter_file(0))
    put(library, "b", adapter_file(1))
    library.pin("a", "test")
    _, lease = library.lease("a")
    assert library.unload("a", "test")[1] == 1
    library.pin("b", "test")  # the unload has freed half of the slots at once
    library.unpin("b", "test")
    library.pin("a", "test")
    lease.release()
    place = library.residency.place(version)
    assert (place.resident, place.pinned, place.pin_held) == (True, True, True)
    library.close()
