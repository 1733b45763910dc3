"""A byte-level BPE vocabulary learnt from a text: every text has tokens in it."""

from collections.abc import Iterable

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from model.tokenizer import Tokenizer

PAD, MASK, CLS = SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[CLS]")  # ids 0, 1, 2


def learn_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) of at most `size` tokens, 259 at least.

    The 256 bytes are tokens themselves, so no character is unknown. A word's leading space belongs
    to its token. Words that occur once make no merges.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        # A mask stands for a word with its space, as it did in training: "the [MASK] of".
        special_tokens=[
            AddedToken(t, special=True, normalized=False, lstrip=t == MASK) for t in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
