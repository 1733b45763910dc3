"""model.gpt.GPT in float32: what every served number is compared with."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.format import AdapterSet, read_adapter
from model.checkpoint import read_backbone, state_dict_of
from model.config import LORA_SITES, GPTConfig
from model.gpt import GPT, is_adapter_tensor
from model.heads import SEQUENCE_HEAD
from model.lora import AdapterWeights, Classifier, SequenceHead


def under_adapter(
    gpt: GPT, tensors: Mapping[str, Tensor], alpha: float, use_rslora: bool = False
) -> GPT:
    """A copy of gpt with the adapter on; classifier and calibration are no part of a GPT."""
    twin = copy.deepcopy(gpt)
    has_critic = "critic_head.weight" in tensors
    if has_critic and not twin.config.add_critic_head:
        twin.config = dataclasses.replace(twin.config, add_critic_head=True)
        twin.critic_head = torch.nn.Linear(twin.config.n_embd, 1, bias=False)
    own = {name: tensor for name, tensor in tensors.items() if is_adapter_tensor(name)}
    twin.load_adapter_state_dict(own, alpha, use_rslora)
    return twin.eval()


@torch.no_grad()
def states_of(gpt: GPT, ids: Sequence[int] | Tensor) -> list[Tensor]:
    """(T, C) after each block, then after ln_f. Every token is read, [PAD] too: nothing is padding
    where rows are packed."""
    idx = torch.as_tensor(ids).reshape(1, -1)
    return [state[0] for state in gpt.hidden_states(idx, torch.ones_like(idx))]


def served(adapter: AdapterSet, config: GPTConfig, dtype: torch.dtype) -> AdapterWeights:
    """The adapter as the encoder takes it, on the CPU, without the server's slots."""
    own = adapter.tensors
    lora = {}
    for site in ((layer, name) for layer in range(config.n_layer) for name in LORA_SITES):
        path = f"transformer.h.{site[0]}.{site[1]}"
        if f"{path}.A.weight" in own:
            a, b = own[f"{path}.A.weight"], own[f"{path}.B.weight"]
            lora[site] = a.to(dtype), (b * adapter.scaling(len(a))).t().contiguous().to(dtype)
    changed = {name: tensor.to(dtype) for name, tensor in own.items() if ".ln_" in name}
    norms = {
        name.removesuffix(".weight"): (weight, changed.get(name.replace("weight", "bias")))
        for name, weight in changed.items()
        if name.endswith(".weight")
    }
    critic = own["critic_head.weight"][0] if "critic_head.weight" in own else None
    classifier = None
    if "classifier.weight" in own:
        bias = own.get("classifier.bias")
        classifier = Classifier(own["classifier.weight"], bias, adapter.labels)
    sequence = None
    if SEQUENCE_HEAD[0] in own:
        weight, a, b = (own[name].float() for name in SEQUENCE_HEAD)
        sequence = SequenceHead(weight[0], a, b)
    return AdapterWeights(
        *(lora, norms, critic, own.get("calibration"), classifier),
        *(sequence, own.get("cls_embedding")),
    )


class Oracle:
    """A backbone folder as GPTs: the backbone alone (None) and under each of its adapters."""

    def __init__(self, folder: Path) -> None:
        backbone = read_backbone(folder)
        self.config, self.tokenizer = backbone.config, backbone.tokenizer
        bare = dataclasses.replace(backbone.config, use_lora_attn=False, use_lora_mlp=False)
        base = GPT(bare).eval()
        state = state_dict_of(bare, backbone.tensors)
        self.has_critic = "critic_head.weight" in state
        self.has_sequence_head = SEQUENCE_HEAD[0] in state
        if bare.cls_token_id is not None:  # a GPT has them then, a backbone may lack them
            state.setdefault("cls_embedding", state["transformer.wte.weight"][bare.cls_token_id])
            state = base.sequence_head.state_dict(prefix="sequence_head.") | state
        base.load_state_dict(state)
        self.gpts: dict[str | None, GPT] = {None: base}
        self.sets: dict[str, AdapterSet] = {}
        for path in sorted((folder / "adapters").glob("*.safetensors")):
            adapter = self.sets[path.stem] = read_adapter(path)
            self.gpts[path.stem] = under_adapter(
                base, adapter.tensors, adapter.lora_alpha, adapter.use_rslora
            )

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def states(self, ids: Sequence[int], adapter: str | None = None) -> list[Tensor]:
        return states_of(self.gpts[adapter], ids)

    def hidden(self, ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """(T, C) after ln_f"""
        return self.states(ids, adapter)[-1]

    def embedding(self, ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """(C,), the normalised mean"""
        return F.normalize(self.hidden(ids, adapter).mean(0), dim=0)

    @torch.no_grad()
    def critic(self, ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """(T,) logits"""
        idx = torch.tensor([list(ids)])
        return self.gpts[adapter].critic_scores(idx, torch.ones_like(idx))[0]

    @torch.no_grad()
    def sequence_score(self, ids: Sequence[int], adapter: str | None = None) -> float:
        idx = torch.tensor([list(ids)])
        return self.gpts[adapter].sequence_scores(idx, torch.ones_like(idx)).item()

    def label_scores(self, ids: Sequence[int], adapter: str) -> dict[str, float]:
        """Softmax of the classifier over the row, pooled as the config has it, by label."""
        tensors, hidden = self.sets[adapter].tensors, self.hidden(ids, adapter)
        row = hidden.mean(0) if self.config.pooling == "mean" else hidden[-1]
        logits = tensors["classifier.weight"] @ row + tensors["classifier.bias"]
        return dict(zip(self.sets[adapter].labels, logits.softmax(0).tolist(), strict=True))
