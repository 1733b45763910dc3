"""Training checkpoints in: a backbone folder and adapter files. Never at request time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapters.calibration_file import FILE_NAME, calibration_of
from adapters.errors import ImportRefused
from adapters.format import FORMAT, adapter_bytes
from adapters.names import BASE, check_name
from adapters.rehearsal import rehearse
from adapters.staging import staged, write_whole
from adapters.training_checkpoint import Checkpoint, read_checkpoint
from adapters.validate import MAX_RANK
from model.checkpoint import (
    CONFIG_FILE,
    Backbone,
    BackboneError,
    backbone_digest,
    backbone_tensors,
    read_backbone,
    write_backbone,
)
from model.config import GPTConfig
from model.gpt import is_adapter_tensor

# Fields in which the checkpoints of one trunk may differ: of training, and of the adapter itself.
_FREE_FIELDS = {
    "dropout",
    "ignore_index",
    "add_critic_head",
    "critic_alpha",
    "use_lora_attn",
    "use_lora_mlp",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
}
_SEQUENCE_HEAD = tuple(f"sequence_head.{part}" for part in ("base_predictor.weight", "A", "B"))
_HEADS = {"critic_head.weight", *_SEQUENCE_HEAD}  # a set without them uses the trunk's
_WAY_OUT = (
    "a run that trains trunk and LoRA together changes both, so each of its checkpoints has a "
    "trunk of its own; train further sets with the trunk frozen, or import this checkpoint as a "
    "trunk of its own with another --out"
)


@dataclass(frozen=True)
class Options:
    """How to import. `dtype` is the one that the files will be served in, and are tried in."""

    ignored_keys: frozenset[str] = frozenset()
    trunk_only: bool = False
    calibration: Path | None = None  # None: the calibration.json beside the checkpoint
    use_calibration: bool = True
    dtype: torch.dtype = torch.float32
    max_rank: int = MAX_RANK


@dataclass(frozen=True)
class Imported:
    adapter: Path | None  # None with trunk_only
    backbone: Path | None  # None where the folder was there already
    dropped: list[str]  # tensors the served model has no use for
    dropped_args: list[str] = field(default_factory=list)  # keys of model_args
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    ckpt: Path,
    meta: Path | None,
    out: Path,
    name: str | None = None,
    options: Options | None = None,
) -> Imported:
    """The first checkpoint of a trunk makes the folder `out`, each one an adapter file in it.

    Without `meta` the vocabulary is the checkpoint's own, or that of the meta file beside it.
    Raises ImportRefused, with a sentence, before anything is written; BadName for a name.
    """
    options = options or Options()
    name = name or _name_of_stem(ckpt.stem)
    check_name(name)
    _demand_place(out)
    try:
        checkpoint = read_checkpoint(ckpt, meta, options.ignored_keys)
        tensors = backbone_tensors(checkpoint.config, checkpoint.state)
        calibration, notes = _calibration(ckpt, options)
        job = _Import(ckpt, out, name, checkpoint, tensors, calibration, options)
        imported = job.add() if (out / CONFIG_FILE).exists() else job.make()
    except BackboneError as error:
        raise ImportRefused(f"{ckpt}: {error}") from error
    except OSError as error:
        where = error.filename or out
        raise ImportRefused(f"{where}: {error.strerror or error}; nothing was written") from error
    notes = [*checkpoint.notes, *notes, *imported.notes]
    return Imported(
        imported.adapter, imported.backbone, checkpoint.dropped, checkpoint.dropped_args, notes
    )


def _calibration(ckpt: Path, options: Options) -> tuple[Tensor | None, list[str]]:
    """The checkpoint's table and what to say of it. Raises ImportRefused where one was asked for
    and is not there."""
    file = options.calibration or ckpt.with_name(FILE_NAME)
    if not options.use_calibration or (options.calibration is None and not file.exists()):
        return None, []
    table, sentence = calibration_of(file, ckpt)
    if table is None and options.calibration is not None:
        raise ImportRefused(
            f"{sentence}: rename the entry that is meant, or leave out --calibration"
        )
    if table is None:
        return None, [f"no calibration was taken: {sentence}"]
    return table, [f"calibration: {sentence}"]


@dataclass
class _Import:
    """One checkpoint on its way into `out`."""

    ckpt: Path
    out: Path
    name: str
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]  # the checkpoint's trunk, under a backbone's names
    calibration: Tensor | None
    options: Options

    @property
    def path(self) -> Path:
        return self.out / "adapters" / f"{self.name}.safetensors"

    def make(self) -> Imported:
        """A trunk of its own, and its LoRA as the first adapter set."""
        lora = {n: t for n, t in self.checkpoint.state.items() if ".lora_" in n}
        if not lora and not self.options.trunk_only:
            raise ImportRefused(
                f"{self.ckpt} has no LoRA tensors, so there is no adapter set to import; "
                "--trunk-only imports its trunk alone"
            )
        config = self.checkpoint.config
        digest = backbone_digest(config, self.tensors)
        backbone = Backbone(
            self.out.name, config, self.tensors, self.checkpoint.tokenizer, None, digest
        )
        if self.options.trunk_only:
            self._rehearse(backbone, {})
            self._write_trunk(self.calibration, None)
            dropped = [f"{len(lora)} LoRA tensors are not in the trunk alone"] if lora else []
            return Imported(None, self.out, [], notes=dropped)
        notes = self._add_calibration(lora, "critic_head.weight" in self.tensors)
        data = self._file(lora, digest)
        self._rehearse(backbone, {self.name: data})
        self._write_trunk(None, data)
        return Imported(self.path, self.out, [], notes=notes)

    def add(self) -> Imported:
        """A further set for the trunk in `out`: the LoRA, and what else differs from the trunk."""
        backbone = read_backbone(self.out)
        own = self.checkpoint.tokenizer.backend.get_vocab()
        theirs = backbone.tokenizer.backend.get_vocab()
        if own != theirs:
            raise ImportRefused(
                f"{self.ckpt} has another vocabulary than the trunk in {self.out}: "
                f"{_difference(own, theirs)}; an adapter set can't carry a vocabulary, so import "
                "it as a trunk of its own with another --out"
            )
        _demand_same_model(self.checkpoint.config, backbone.config, self.out)
        carried = self._differing(backbone)
        if self.options.trunk_only:
            if carried:
                raise ImportRefused(self._another_trunk(sorted(carried)))
            return Imported(None, None, [], notes=[f"{self.out} has this trunk already"])
        carried |= {n: t for n, t in self.checkpoint.state.items() if ".lora_" in n}
        if not carried:
            raise ImportRefused(
                f"{self.ckpt} has no LoRA tensors, and nothing in it differs from the trunk in "
                f"{self.out}: there is no adapter set to import"
            )
        notes = [f"the set has no {head}: the trunk's is used" for head in self._lacking(backbone)]
        has_critic = "critic_head.weight" in {*carried, *backbone.tensors}
        notes += self._add_calibration(carried, has_critic)
        data = self._file(carried, backbone.digest)
        self._rehearse(backbone, {self.name: data})
        if self.path.exists() and self.path.read_bytes() != data:
            notes.append(f"replaced: {self.path} held another set; --name gives a set its own file")
        write_whole(self.path, data)
        return Imported(self.path, None, [], notes=notes)

    def _differing(self, backbone: Backbone) -> dict[str, Tensor]:
        """What an adapter set must carry beside LoRA. Raises ImportRefused for another trunk."""
        missing = sorted(set(backbone.tensors) - set(self.tensors) - _HEADS)
        if missing:
            raise ImportRefused(f"{self.out} has {missing[0]}, and {self.ckpt} has not; {_WAY_OUT}")
        differing = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not _are_equal(tensor, backbone.tensors.get(name))
        }
        others = sorted(name for name in differing if not is_adapter_tensor(name))
        if others:
            raise ImportRefused(self._another_trunk(others))
        _complete(differing, self.tensors)
        return differing

    def _another_trunk(self, names: list[str]) -> str:
        """The sentence of a refusal by the tensors that differ."""
        more = f", and {len(names) - 1} more do" if len(names) > 1 else ""
        tied = (
            "; freeze_transformer leaves lm_head trainable, which is the same tensor as wte"
            if names == ["transformer.wte.weight"]
            else ""
        )
        return (
            f"{self.ckpt}: {names[0]} differs from that in {self.out}{more}: this is another "
            f"trunk, and an adapter set can't carry it; {_WAY_OUT}{tied}"
        )

    def _lacking(self, backbone: Backbone) -> list[str]:
        """The trunk's heads that the checkpoint does not have."""
        lacking = _HEADS & set(backbone.tensors) - set(self.tensors)
        return sorted({name.partition(".")[0] for name in lacking})

    def _add_calibration(self, carried: dict[str, Tensor], has_critic: bool) -> list[str]:
        if self.calibration is None:
            return []
        if not has_critic:
            return ["the calibration was left out: neither the set nor its trunk has a critic"]
        carried["calibration"] = self.calibration
        return []

    def _file(self, tensors: Mapping[str, Tensor], base_digest: str) -> bytes:
        metadata = {
            "format": FORMAT,
            "lora_alpha": repr(self.checkpoint.config.lora_alpha),
            "base_digest": base_digest,
        }
        return adapter_bytes(tensors, metadata)

    def _rehearse(self, backbone: Backbone, files: Mapping[str, bytes]) -> None:
        try:
            rehearse(backbone, files, self.options.dtype, self.options.max_rank)
        except ImportRefused as error:
            raise ImportRefused(f"{self.ckpt}: {error}") from error

    def _write_trunk(self, calibration: Tensor | None, adapter: bytes | None) -> None:
        with staged(self.out) as folder:
            checkpoint = self.checkpoint
            write_backbone(
                folder, checkpoint.config, self.tensors, checkpoint.tokenizer, calibration
            )
            if adapter is not None:
                write_whole(folder / self.path.relative_to(self.out), adapter)


def _are_equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _difference(own: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """How two vocabularies differ, in a clause."""
    added, lacking = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
    if added == ["[CLS]"] and not lacking:
        return (
            "it has [CLS] and the trunk's has not (the sequence scorer's data set adds it to one "
            "that lacks it, so train the first stage with [CLS] in its vocabulary)"
        )
    if not added and not lacking:
        return "the same entries have other ids"
    return f"{len(added)} of its entries are not the trunk's, {len(lacking)} of the trunk's not its"


def _demand_same_model(config: GPTConfig, backbone: GPTConfig, out: Path) -> None:
    """Equal shapes are not enough: n_head, say, changes what the same tensors compute."""
    for name, value in backbone.to_dict().items():
        own = getattr(config, name)
        if name not in _FREE_FIELDS and own != value:
            raise ImportRefused(
                f"{name} is {value} in {out} and {own} in the checkpoint: it has another trunk; "
                "import it with another --out"
            )


def _complete(carried: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """A LayerNorm and the sequence head travel whole, also where only a part of them differs."""
    norms = {name.rpartition(".")[0] for name in carried if ".ln_" in name}
    wanted = {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    if any(name in carried for name in _SEQUENCE_HEAD):
        wanted |= set(_SEQUENCE_HEAD)
    carried |= {name: tensors[name] for name in wanted & set(tensors)}


def _demand_place(out: Path) -> None:
    """Raises ImportRefused where no folder can be at `out`."""
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise ImportRefused(f"--out {out}: {path} is a file, and a trunk is a folder")
            return


def _name_of_stem(stem: str) -> str:
    """The stem as a valid adapter name: lower case, other characters as '-', 64 at most."""
    name = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", stem.lower()).strip("._-")[:64] or "adapter"
    return f"{name}-adapter" if name == BASE else name
