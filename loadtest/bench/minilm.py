"""sentence-transformers on an encoder of MiniLM's size, beside the trunk without adapters.

Both get ids, the same lengths and the same number of rows; theirs sorted by length in batches of
32, as its `encode` does. The weights differ, so only the shapes of the results are compared.
"""

import importlib
import importlib.util
from functools import partial

import torch
from torch import Tensor

from loadtest.bench.oracle import Mismatch
from loadtest.bench.padding import pad
from loadtest.bench.pairs import in_turn, speedups
from loadtest.bench.plan import Plan
from loadtest.bench.report import Report
from loadtest.bench.trunk import Rows, Trunk, mixed_lengths

BATCH_ROWS = 32  # SentenceTransformer.encode's default


class SentencePeer:
    def __init__(self, plan: Plan) -> None:
        library = importlib.import_module("sentence_transformers")
        self.model = (
            library.SentenceTransformer(str(plan.minilm), device="cpu").to(plan.dtype).eval()
        )
        self.config = self.model[0].auto_model.config

    @torch.inference_mode()
    def embed(self, rows: Rows) -> Tensor:
        """(B, C), in the order of their lengths."""
        ids = sorted((row % self.config.vocab_size for row in rows.ids), key=len)
        parts = []
        for start in range(0, len(ids), BATCH_ROWS):
            some = ids[start : start + BATCH_ROWS]
            idx, _ = pad(some)
            lengths = torch.tensor([len(row) for row in some])
            mask = (torch.arange(idx.shape[1]) < lengths[:, None]).long()
            features = {"input_ids": idx, "attention_mask": mask}
            parts.append(self.model(features)["sentence_embedding"])
        return torch.cat(parts)


def embed_rows(trunk: Trunk, rows: Rows) -> Tensor:
    return trunk.device_thread.submit(trunk.embed, rows).result()


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        report.left_out("peers, MiniLM", "the package sentence-transformers is not installed")
        return
    peer, sizes = SentencePeer(plan), plan.sizes
    count = sizes.batch_tokens // sizes.uniform
    for name, lengths in (
        ("uniform", [sizes.uniform] * count),
        ("mixed", mixed_lengths(count * sizes.uniform)),
    ):
        rows = trunk.rows(lengths)
        if len(peer.embed(rows)) != len(embed_rows(trunk, rows)):
            raise Mismatch("sentence-transformers gave another number of rows")
        times = in_turn(
            {"own": partial(embed_rows, trunk, rows), "theirs": partial(peer.embed, rows)},
            sizes.slow_rounds,
            sizes.round_s,
        )
        theirs = peer.config
        report.ratio(
            "peers",
            f"sentence-transformers, {name} lengths",
            f"also.over_sentence_transformers_{name}",
            speedups(times, "own", "theirs"),
            f"theirs {theirs.hidden_size} wide, {theirs.num_hidden_layers} layers; base only",
        )
