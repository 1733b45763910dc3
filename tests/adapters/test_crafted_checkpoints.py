"""Crafted checkpoints and meta files: refused in a sentence, at the cost of their own size."""

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import KIT

from adapters import pickle_scan
from adapters.errors import ImportRefused
from adapters.pickle_scan import MAX_DEPTH
from adapters.pickles import load_checkpoint, load_meta

ROOM_MB = 96  # beside four times the file
META = b"\x80\x04}\x8c\x04stoi}s"  # a dict with a stoi, to be closed by "."


def meta(body: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "meta.pkl"
        path.write_bytes(body)
        return path

    return write


def archive(
    pkl: bytes, *, data: bytes = b"", method: int = zipfile.ZIP_STORED
) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "ckpt.pt"
        with zipfile.ZipFile(path, "w", method) as out:
            out.writestr("archive/data.pkl", pkl)
            out.writestr("archive/byteorder", sys.byteorder)
            out.writestr("archive/data/0", data)
        return path

    return write


def tensor(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickled {"model": {"transformer.wte.weight": a tensor of these}, "model_args": {}}."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(numel) + b"tQ"
    rebuilt += number(0) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    wte = b"}" + text("transformer.wte.weight") + rebuilt + b"s"
    return b"\x80\x02}" + text("model") + wte + b"s" + text("model_args") + b"}s."


TUPLES = b"\x80\x04}N" + b"\x85" * 500_000 + b"Ns."  # a key of nested tuples: hashing it recurses
CRAFTED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a key of tuples nested 500,000 deep": (meta(TUPLES), f"deeper than {MAX_DEPTH}"),
    "lists nested 5,000 deep": (
        meta(b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b"."),
        f"deeper than {MAX_DEPTH}",
    ),
    "a memo index of 2^28": (meta(b"\x80\x04}r" + struct.pack("<I", 1 << 28) + b"."), "memo index"),
    "a text of 2^40 bytes": (
        meta(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"."),
        "not a pickle",
    ),
    "bytes of 2^40": (meta(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."), "not a pickle"),
    "an integer of a million digits": (meta(b"\x80\x04L" + b"9" * 10**6 + b"L\n."), "not a pickle"),
    "cut off": (meta(META), "not a pickle"),
    "code": (meta(b"\x80\x04cos\nsystem\n."), "asks for os.system"),
    "a zip bomb": (
        archive(b"\x80\x02}.", data=bytes(1 << 25), method=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "a storage said to be larger than its bytes": (
        archive(tensor(1 << 40, (1 << 20, 1 << 20), (1 << 20, 1)), data=bytes(64)),
        "more values than there are",
    ),
    "a tensor of stride 0": (
        archive(tensor(16, (1 << 20, 1 << 20), (0, 0)), data=bytes(64)),
        "larger than its values",
    ),
    "a tensor that goes beyond its storage": (
        archive(tensor(16, (4, 4), (8, 1)), data=bytes(64)),
        "larger than its values",
    ),
    "negative strides": (archive(tensor(16, (4, 4), (-4, 1)), data=bytes(64)), "torch.save"),
}


def load(path: Path) -> None:
    (load_meta if path.suffix == ".pkl" else load_checkpoint)(path)


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_file_is_refused_in_a_sentence_that_names_it(tmp_path: Path, case: str) -> None:
    write, sentence = CRAFTED[case]
    path = write(tmp_path)
    with pytest.raises(ImportRefused, match=sentence) as error:
        load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


MEASURED = """
import json, resource, sys
sys.path[:0] = ["tests/adapters", "tests"]
from pathlib import Path
from test_crafted_checkpoints import load
from adapters.errors import ImportRefused
peaks = {}
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(path)
    except ImportRefused:
        pass
    peaks[str(path)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps(peaks))
"""


def test_no_crafted_file_takes_more_memory_than_a_small_multiple_of_its_size(
    tmp_path: Path,
) -> None:
    paths = []
    for number, (write, _) in enumerate(CRAFTED.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(write(tmp_path / str(number)))
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for path, kilobytes in json.loads(run.stdout).items():
        room = 4 * Path(path).stat().st_size + (ROOM_MB << 20)
        assert kilobytes << 10 < room, path


def test_a_pickle_of_too_many_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_scan, "MAX_OPCODES", 1000)
    with pytest.raises(ImportRefused, match="more than 1,000 parts"):
        load_meta(meta(b"\x80\x04" + b"]0" * 600 + b"N.")(tmp_path))


def test_tensors_that_overlap_cannot_add_up_to_more_than_the_file(tmp_path: Path) -> None:
    base = torch.zeros(200_000)
    views = {f"transformer.h.{n}.x": base[n : n + 199_000] for n in range(50)}
    torch.save({"model": views, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ImportRefused, match="overlap"):
        load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_save_writes_is_read_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    big = torch.randn(8, 6)
    model = {
        "plain": big,
        "tied": big,
        "turned": big.T,
        "part": big[2:5, 1:3],
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    saved = {"model": model, "model_args": {"n_layer": torch.tensor(2)}, "iter_num": 7}
    torch.save(saved, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / "ckpt.pt")
    assert found["iter_num"] == 7
    assert found["model_args"]["n_layer"].item() == 2
    for name, tensor in model.items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.equal(found["model"][name], tensor.detach())
    assert found["model"]["plain"].data_ptr() == found["model"]["tied"].data_ptr()


def test_the_kit_reads_as_torch_load_reads_it() -> None:
    path = KIT / "ckpt_a.pt"
    found, theirs = load_checkpoint(path), torch.load(path, weights_only=True)
    assert found["model_args"] == theirs["model_args"]
    assert found["model"].keys() == theirs["model"].keys()
    for name, tensor in theirs["model"].items():
        assert torch.equal(found["model"][name], tensor)
    assert load_meta(KIT / "meta.pkl") == pickle.loads((KIT / "meta.pkl").read_bytes())
