"""Our reader of adapter files against the safetensors library: stricter, never laxer.

FUZZ_EXAMPLES in the environment makes the run longer than the short one of `make test`.
"""

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from bad_files import HEADER_FAULTS, file_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor

from adapters.errors import Invalid
from adapters.format import (
    DTYPES,
    FORMAT,
    MAX_TENSORS,
    adapter_bytes,
    header_length,
    parse_adapter,
    parse_header,
    read_adapter,
    write_adapter,
)

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
fuzz = settings(
    max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=2)
METADATA = st.dictionaries(TEXTS, TEXTS, max_size=4)


@st.composite
def tensors_of_any_bits(draw: st.DrawFn) -> Tensor:
    """NaN, infinities and denormals too: this is about bytes, not values."""
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
    size = dtype.itemsize * torch.Size(shape).numel()
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return torch.frombuffer(raw, dtype=dtype).view(shape)


NAMES = TEXTS.filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(NAMES, tensors_of_any_bits(), min_size=1, max_size=4)


def split(file: bytes) -> tuple[str, bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end].decode(), file[end:]


VALID = save(
    {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)},
    {"format": FORMAT, "lora_alpha": "8.0"},
)
HEADER, DATA = split(VALID)


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        )


def assert_never_laxer(file: bytes) -> None:
    """Refused with Invalid, or taken, and then by the library too, as the same."""
    try:
        adapter = parse_adapter(bytearray(file))
    except Invalid:
        return
    assert_same(adapter.tensors, load(file))


def reason_of(file: bytes) -> str:
    with pytest.raises(Invalid) as caught:
        parse_header(file)
    reason: str = caught.value.details["reason"]
    return reason


@fuzz
@given(TENSORS, METADATA)
def test_what_the_library_saves_is_taken_as_it_is(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    file = save(tensors, metadata)
    adapter = parse_adapter(bytearray(file))
    assert_same(adapter.tensors, tensors)
    assert adapter.metadata == metadata


@fuzz
@given(TENSORS, METADATA)
def test_our_files_are_the_same_bytes_for_the_same_content_and_the_library_loads_them(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    file = adapter_bytes(tensors, metadata)
    backwards = adapter_bytes(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert file == backwards
    assert_same(load(file), tensors)
    assert parse_adapter(bytearray(file)).metadata == metadata


@fuzz
@given(st.lists(st.integers(0, 8 * len(VALID) - 1), min_size=1, max_size=4))
def test_flipped_bits_are_refused_or_read_as_the_library_reads_them(bits: list[int]) -> None:
    file = bytearray(VALID)
    for bit in bits:
        file[bit // 8] ^= 1 << bit % 8
    assert_never_laxer(bytes(file))


@fuzz
@given(st.integers(0, len(VALID)), st.integers(0, 16), st.binary(max_size=16))
def test_inserted_and_deleted_bytes_are_refused_or_read_as_the_library_reads_them(
    at: int, deleted: int, inserted: bytes
) -> None:
    assert_never_laxer(VALID[:at] + inserted + VALID[at + deleted :])


@fuzz
@given(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(VALID)))
def test_any_header_length_is_refused_or_read_as_the_library_reads_it(length: int) -> None:
    assert_never_laxer(length.to_bytes(8, "little") + VALID[8:])


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read_as_the_library_reads_them(junk: bytes) -> None:
    assert_never_laxer(junk)
    assert_never_laxer(file_of(b"{" + junk))


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9.eE+]+|\w+|[^\w\s]')
# What JSON readers take differently, and what a header must not have.
ODD_TOKENS = [
    *("-0", "0", "-1", "1.0", "6e0", "06", "+6", "NaN", "Infinity", "null", "true", "9" * 30),
    *(str(2**62), str(2**63), str(2**64 - 1), str(2**64), "1e400", "5" * 5000),
    *('"a"', '"\\u0061"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\t"', '"\\x"', "'a'"),
    *('"F32"', '"F64"', '"I8"', '"BOOL"', '"F8_E4M3"', '"F4"', '"f32"', '"\\u004632"'),
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"extra"', '"é"'),
    *("{", "}", "[", "]", ",", ":", "{}", "[]", "[2, 3]", "[24, 32]", "[0, 24]", "[[", "/**/"),
    *(" ", "\n", "\ufeff", "\x0b", "\u00a0", "\x00"),
]
EDITS = st.tuples(
    st.sampled_from(("replace", "insert", "delete", "repeat")),
    st.integers(0, 100),
    st.sampled_from(ODD_TOKENS) | TEXTS,
)


def edited(header: str, edits: list[tuple[str, int, str]]) -> str:
    tokens = TOKEN.findall(header)
    for action, place, token in edits:
        at = place % len(tokens) if tokens else 0
        new = {"replace": [token], "insert": [token, *tokens[at : at + 1]], "delete": []}
        tokens[at : at + 1] = new.get(action, tokens[at : at + 1] * 2)
    return "".join(tokens)


@fuzz
@given(st.lists(EDITS, min_size=1, max_size=3), st.sampled_from(["", " ", "\n", "\0"]))
def test_edited_headers_are_refused_or_read_as_the_library_reads_them(
    edits: list[tuple[str, int, str]], end: str
) -> None:
    assert_never_laxer(file_of(edited(HEADER, edits) + end, DATA))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
LISTS = st.lists(SCALARS, max_size=3)
JSON = SCALARS | LISTS | st.dictionaries(TEXTS, SCALARS | LISTS, max_size=3)


@fuzz
@given(
    JSON,
    st.sampled_from(["entry", "dtype", "shape", "data_offsets", "__metadata__", "header"]),
)
def test_any_json_in_any_place_is_refused_or_read_as_the_library_reads_it(
    value: object, place: str
) -> None:
    header = json.loads(HEADER)
    if place == "header":
        header = value
    elif place == "__metadata__":
        header[place] = value
    elif place == "entry":
        header["a"] = value
    else:
        header["a"][place] = value
    assert_never_laxer(file_of(json.dumps(header), DATA))


def test_every_truncation_is_refused() -> None:
    for length in range(len(VALID)):
        assert reason_of(VALID[:length]) in ("truncated", "no_tensors", "not_safetensors")


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_fault_of_the_header_is_refused_with_its_reason(fault: str) -> None:
    file, reason = HEADER_FAULTS[fault]
    assert reason_of(file) == reason


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_of_torch_is_refused_with_the_way_to_import_it(old_format: bool) -> None:
    file = io.BytesIO()
    torch.save({"model": {}}, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(Invalid, match="`trunkline import` makes an adapter file"):
        header_length(file.getvalue())


def test_a_million_empty_tensors_are_refused_by_the_length_of_their_header_alone() -> None:
    # 57 MB would follow; eight bytes say enough.
    assert reason_of((57_000_000).to_bytes(8, "little") + b'{"') == "header_too_large"


def test_too_many_tensors_are_refused_before_their_entries_are_looked_at() -> None:
    header = json.dumps({str(i): None for i in range(MAX_TENSORS + 1)})
    assert reason_of(file_of(header)) == "too_many_tensors"


def test_a_file_is_written_whole_with_what_it_needs_and_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.safetensors"
    tensors = {"a": torch.randn(2, 3)}
    write_adapter(path, tensors, lora_alpha=8, base_digest="sha256:x", metadata={"license": "MIT"})
    adapter = read_adapter(path)
    assert_same(adapter.tensors, tensors)
    assert_same(load_file(path), tensors)
    assert adapter.metadata == {
        "format": FORMAT,
        "lora_alpha": "8.0",
        "base_digest": "sha256:x",
        "license": "MIT",
    }
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_scaling_is_alpha_over_r_and_over_its_root_with_rslora() -> None:
    tensors = {"a": torch.ones(1)}
    plain = parse_adapter(bytearray(adapter_bytes(tensors, {"lora_alpha": "8"})))
    rslora = adapter_bytes(tensors, {"lora_alpha": "8", "use_rslora": "true"})
    assert plain.scaling(16) == 0.5
    assert parse_adapter(bytearray(rslora)).scaling(16) == 2.0
