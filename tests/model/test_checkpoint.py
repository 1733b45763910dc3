"""The backbone folder: read and written strictly, known by a digest."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_gpt, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import (
    BackboneError,
    backbone_digest,
    backbone_tensors,
    read_backbone,
    state_dict_of,
    write_backbone,
)
from model.config import GPTConfig
from model.gpt import GPT

Tensors = dict[str, Tensor]
UNSHARED = dataclasses.replace(TINY, share_main_matrices=False)


def tensors_of(config: GPTConfig = TINY) -> Tensors:
    return backbone_tensors(config, random_gpt(config).state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_backbone(tmp_path / "trunk", TINY, tensors_of(), tiny_tokenizer())
    return tmp_path / "trunk"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_reads_back_bit_for_bit(
    tmp_path: Path, shared: bool, bias: bool, dtype: torch.dtype
) -> None:
    config = dataclasses.replace(TINY, share_main_matrices=shared, bias=bias, pooling="last")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(config).items()}
    table = torch.linspace(0, 1, 100)
    digest = write_backbone(tmp_path / "trunk", config, tensors, tiny_tokenizer(), table)
    backbone = read_backbone(tmp_path / "trunk")
    assert backbone.id == "trunk"
    assert backbone.config == config
    assert backbone.digest == digest
    assert backbone.tensors.keys() == tensors.keys()
    assert all(torch.equal(backbone.tensors[name], tensors[name]) for name in tensors)
    assert torch.equal(backbone.calibration, table)


def test_shared_matrices_are_stored_once_and_lm_head_not_at_all() -> None:
    names = set(tensors_of())
    assert {n for n in names if "c_fc" in n} == {"shared.mlp.c_fc.weight", "shared.mlp.c_fc.bias"}
    assert "lm_head.weight" not in names
    assert not any(".lora_" in name for name in names)
    assert sum("c_fc.weight" in name for name in tensors_of(UNSHARED)) == TINY.n_layer


@pytest.mark.parametrize("config", [TINY, UNSHARED], ids=["shared", "unshared"])
def test_a_backbone_s_tensors_are_a_whole_gpt_s_state(config: GPTConfig) -> None:
    bare = dataclasses.replace(config, use_lora_attn=False, use_lora_mlp=False)
    gpt, again = random_gpt(bare), GPT(bare).eval()
    again.load_state_dict(state_dict_of(bare, backbone_tensors(bare, gpt.state_dict())))
    idx = torch.randint(60, (2, 9))
    assert torch.equal(again(idx)[0], gpt(idx)[0])
    assert torch.equal(again.critic_scores(idx), gpt.critic_scores(idx))


def test_matrices_called_shared_that_differ_are_refused_by_name_and_layer() -> None:
    state = random_gpt(UNSHARED).state_dict()
    with pytest.raises(BackboneError, match=r"attn\.c_attn\.\w+ of layer 1 differs"):
        backbone_tensors(TINY, state)


def test_an_lm_head_that_is_not_tied_is_refused() -> None:
    state = random_gpt(TINY).state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(BackboneError, match="not tied"):
        backbone_tensors(TINY, state)


# A folder that is not as it must be is refused with a sentence that says what and where.


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return edit


def edit_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "backbone.safetensors")
        change(tensors)
        save_file(tensors, folder / "backbone.safetensors")

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def as_folder(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def cut(name: str, share: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return edit


WTE = "transformer.wte.weight"
REFUSED = {
    "unknown config key": (edit_config(lambda c: c.update(n_heads=2)), r"config\.json.*'n_heads'"),
    "impossible config": (edit_config(lambda c: c.update(n_head=3)), r"config\.json.*n_head 3"),
    "config of a wrong type": (edit_config(lambda c: c.update(bias=1)), r"config\.json.*bias"),
    "config no object": (write("config.json", b"[]"), r"config\.json must hold a JSON object"),
    "config no JSON": (write("config.json", b"{"), r"config\.json is not JSON"),
    "config not UTF-8": (write("config.json", b'{"\xff": 1}'), r"config\.json is not JSON"),
    "config nested deeply": (
        write("config.json", b"[" * 100_000),
        r"config\.json is not JSON: it is nested too deeply",
    ),
    "config too large": (
        write("config.json", b" " * (2 << 20)),
        r"config\.json has 2097152 bytes; such a file has at most",
    ),
    "config a folder": (as_folder("tokenizer.json"), r"tokenizer\.json is not a plain file"),
    "a thousand unknown keys": (
        edit_config(lambda c: c.update({f"key{n}" * 50: n for n in range(1000)})),
        r"config\.json: unknown config key .{1,350} and 995 more; take it from",
    ),
    "a number of 4,000 digits": (
        edit_config(lambda c: c.update(n_layer=10**4000)),
        r"config\.json: n_layer is too large a number",
    ),
    "a table of angles larger than any": (
        edit_config(lambda c: c.update(block_size=1 << 20, n_embd=1 << 20)),
        r"config\.json: block_size 1048576 times .* must be at most",
    ),
    "a billion token ids": (
        edit_config(lambda c: c.update(vocab_size=10**9)),
        r"backbone\.safetensors has \d+ bytes, and .* describes have at least 320000",
    ),
    "four thousand layers of none": (
        edit_config(lambda c: c.update(n_layer=4000)),
        r"backbone\.safetensors has \d+ bytes",
    ),
    "tensors cut off": (cut("backbone.safetensors", 0.9), r"backbone\.safetensors"),
    "tensors cut in the header": (cut("backbone.safetensors", 0.02), r"backbone\.safetensors"),
    "a header of 2^62 bytes": (
        write("backbone.safetensors", (1 << 62).to_bytes(8, "little") + bytes(1 << 20)),
        r"backbone\.safetensors is not a safetensors file: its header is too long",
    ),
    "config missing": (
        remove("config.json"),
        r"not a backbone folder: its config\.json is missing",
    ),
    "tensor missing": (
        edit_tensors(lambda t: t.pop("shared.mlp.c_fc.bias")),
        r"1 tensors are missing, the first is shared\.mlp\.c_fc\.bias",
    ),
    "tensor too many": (
        edit_tensors(lambda t: t.update(extra=torch.ones(1))),
        r"not of this model: extra",
    ),
    "a layer too many": (
        edit_tensors(lambda t: t.update({"transformer.h.2.ln_1.weight": torch.ones(16)})),
        r"transformer\.h\.2\.ln_1\.weight",
    ),
    "tensor of another shape": (
        edit_tensors(lambda t: t.update({WTE: t[WTE][1:].clone()})),
        r"wte\.weight has shape \[64, 16\], not \[65, 16\]",
    ),
    "tensor transposed": (
        edit_tensors(lambda t: t.update({WTE: t[WTE].t().contiguous()})),
        r"wte\.weight has shape \[16, 65\]",
    ),
    "NaN": (edit_tensors(lambda t: t[WTE][3].fill_(torch.nan)), r"wte\.weight.*not finite"),
    "infinity": (edit_tensors(lambda t: t[WTE][3].fill_(torch.inf)), r"wte\.weight.*not finite"),
    "float64": (
        edit_tensors(lambda t: t.update({WTE: t[WTE].double()})),
        r"wte\.weight is torch\.float64",
    ),
    "half a sequence head": (
        edit_tensors(lambda t: t.pop("sequence_head.A")),
        r"sequence head has three tensors",
    ),
    "tensors no safetensors": (
        write("backbone.safetensors", b"PK\3\4"),
        r"backbone\.safetensors is not a safetensors file",
    ),
    "tensors missing": (remove("backbone.safetensors"), r"backbone\.safetensors is missing"),
    "tokenizer missing": (remove("tokenizer.json"), r"tokenizer\.json is missing"),
    "tokenizer broken": (write("tokenizer.json", b"{}"), r"tokenizer\.json is not a tokenizer"),
    "99 calibration values": (
        write("calibration.json", json.dumps([0.5] * 99).encode()),
        r"calibration\.json must hold 100 numbers",
    ),
    "calibration above 1": (
        write("calibration.json", json.dumps([0.5] * 99 + [1.1]).encode()),
        r"calibration\.json must hold 100 numbers",
    ),
    "calibration NaN": (
        write("calibration.json", json.dumps([0.5] * 99 + [float("nan")]).encode()),
        r"calibration\.json must hold 100 numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_not_as_it_must_be_is_refused_and_says_where(folder: Path, case: str) -> None:
    spoil, sentence = REFUSED[case]
    spoil(folder)
    with pytest.raises(BackboneError, match=sentence):
        read_backbone(folder)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=64, cls_token_id=None)
    write_backbone(tmp_path, config, tensors_of(config), tiny_tokenizer())
    with pytest.raises(BackboneError, match="65 tokens, more than vocab_size 64"):
        read_backbone(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no such folder"):
        read_backbone(tmp_path / "nowhere")


def test_tensors_that_would_not_read_back_are_not_written(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors[WTE][0, 0] = torch.nan
    with pytest.raises(BackboneError, match="not finite"):
        write_backbone(tmp_path / "trunk", TINY, tensors, tiny_tokenizer())
    assert not (tmp_path / "trunk").exists()


# The digest.


def test_the_digest_depends_on_content_and_not_on_order_or_layout() -> None:
    tensors = tensors_of()
    shuffled = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    shuffled[WTE] = shuffled[WTE].t().contiguous().t()  # the same values, laid out by columns
    assert backbone_digest(TINY, shuffled) == backbone_digest(TINY, tensors)


def test_the_digest_of_a_known_backbone_stays_what_it_is() -> None:
    """Adapter files carry it: a change here would orphan every one of them."""
    config = GPTConfig(block_size=2, vocab_size=3, n_layer=1, n_head=1, n_embd=2, bias=False)
    names = tensors_of(config)
    ones = {name: torch.ones_like(tensor) for name, tensor in names.items()}
    assert backbone_digest(config, ones) == (
        "sha256:cc13f284574829cf73dfd143e84aa139709006d93ba425e6429814424c53590a"
    )


@pytest.mark.parametrize(
    "name", [WTE, "shared.mlp.c_proj.bias", "sequence_head.B", "cls_embedding"]
)
def test_one_bit_of_one_tensor_changes_the_digest(name: str) -> None:
    tensors = tensors_of()
    before = backbone_digest(TINY, tensors)
    tensors[name].view(torch.int32).flatten()[-1] ^= 1
    assert backbone_digest(TINY, tensors) != before


def test_name_dtype_and_shape_are_part_of_the_digest() -> None:
    seen = {backbone_digest(TINY, tensors_of())}
    for change in (
        {"cls_embedding": torch.zeros(16)},
        {"cls_embedding": torch.zeros(16, dtype=torch.float16)},
        {"cls_embedding": torch.zeros(16, dtype=torch.bfloat16)},
        {"cls_embedding": torch.zeros(1, 16)},
        {"cls_embeddinG": torch.zeros(16)},
    ):
        rest = tensors_of()
        rest.pop("cls_embedding")
        seen.add(backbone_digest(TINY, rest | change))
    assert len(seen) == 6


@pytest.mark.parametrize(
    "change", [{"n_head": 4}, {"block_size": 65}, {"mask_token_id": None}, {"pooling": "cls"}]
)
def test_the_config_is_part_of_the_digest(change: dict[str, object]) -> None:
    tensors = tensors_of()
    changed = dataclasses.replace(TINY, **change)
    assert backbone_digest(changed, tensors) != backbone_digest(TINY, tensors)
