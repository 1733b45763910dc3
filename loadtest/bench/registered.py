"""A trunk and its adapters on the disk, as `trunkline serve` takes them.

The files and rows in the data folder are those that uploads leave. Probes and fsyncs are left out,
and of files of one length the first alone is checked, so that ten thousand take seconds.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters.format import FORMAT, adapter_bytes, parse_adapter
from adapters.registry import Registry
from adapters.store import Blob, BlobStore
from adapters.validate import validate
from adapters.versions import Record
from loadtest.bench.plan import Plan
from loadtest.bench.trunk import Trunk, adapter_tensors
from model.checkpoint import write_backbone
from server.app import data_folder
from server.settings import load_settings

NamedFile = tuple[str, bytes]

SETS = 64  # of different weights
TINY_SITE = "transformer.h.0.attn.lora_qkv."


def write_trunk(scratch: Path, trunk: Trunk) -> Path:
    """Its backbone folder; the name is the backbone's id."""
    folder = scratch / trunk.backbone.id
    if not folder.exists():
        write_backbone(folder, trunk.config, trunk.backbone.tensors, trunk.backbone.tokenizer)
    return folder


def server_arguments(plan: Plan, folder: Path, data: Path) -> list[str]:
    """Of `trunkline serve`, with the backbone folder, the data folder and the plan's settings."""
    arguments = [str(folder), "--data", str(data), "--dtype", plan.dtype_name]
    arguments += ["--threads", str(plan.threads)]
    return [*arguments, "--max-batch-tokens", str(plan.sizes.batch_tokens)]


def name_of(index: int) -> str:
    return f"tenant-{index % 97}/adapter-{index:05}"


def full_files(trunk: Trunk, count: int, rank: int) -> Iterator[NamedFile]:
    """Adapters that change every site: those of trunk.adapters.

    Beyond SETS the weights come again, in files with bytes, and so a slot, of their own.
    """
    sets = [trunk.adapter_set(rank, index) for index in range(min(count, SETS))]
    for index in range(count):
        adapter = sets[index % SETS]
        own = {"number": str(index)} if index >= SETS else {}
        yield name_of(index), adapter_bytes(adapter.tensors, dict(adapter.metadata) | own)


def tiny_files(trunk: Trunk, indices: Iterable[int]) -> Iterator[NamedFile]:
    """Adapters of rank 1 at one site of one layer, each with bytes of its own."""
    tensors = {
        name: tensor
        for name, tensor in adapter_tensors(trunk.config, 1, 0).items()
        if name.startswith(TINY_SITE)
    }
    fields = {"format": FORMAT, "lora_alpha": "2.0", "base_digest": trunk.digest}
    number = '"number":"%08d"'
    file = adapter_bytes(tensors, fields | {"number": "00000000"})
    assert (number % 0).encode() in file, "the header is written otherwise now"
    for index in indices:
        yield name_of(index), file.replace((number % 0).encode(), (number % index).encode())


def register(data: Path, trunk: Trunk, files: Iterable[NamedFile]) -> Path:
    """Fill the folder that `trunkline serve --data DATA` has for this trunk, and return it."""
    folder = data_folder(load_settings({"data_dir": data}), trunk.backbone)
    folder.mkdir(parents=True)
    store, registry = BlobStore(folder / "blobs"), Registry(folder / "registry.sqlite")
    records: dict[int, Record] = {}  # files of one length change the same
    with registry.writing() as connection:
        for name, file in files:
            if len(file) not in records:
                records[len(file)] = _record(trunk, file)
            digest = f"sha256:{hashlib.sha256(file).hexdigest()}"
            path = store.path(digest)
            path.write_bytes(file)
            blob = Blob(digest, len(file), path.stat().st_mtime_ns)
            registry.add(connection, name, blob, records[len(file)], "bench")
    registry.close()
    return folder


def _record(trunk: Trunk, file: bytes) -> Record:
    adapter = parse_adapter(bytearray(file))
    manifest = validate(adapter, trunk.config, trunk.digest, trunk.dtype)
    return Record(manifest, adapter.metadata, probe_delta=1.0)
