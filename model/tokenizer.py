"""Text <-> ids, with character offsets; nothing is dropped in silence."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, decoders, models
from tokenizers import Tokenizer as Backend

# Longer texts are encoded without the GIL, which takes a little longer.
LONG = 4096
# In JSON: an escaped control character, or U+FFFD for each byte of a byte-level entry, is shorter.
BYTES_OF_A_CHARACTER = 6
# Texts beyond this many characters are counted piece by piece before they are encoded, since an
# Encoding takes 200 bytes a token and its memory is freed in one call that holds the GIL.
PIECE = 64 << 10
# How many tokens of a text may change, at most, where a piece of it ends.
TOKENS_OF_A_CUT = 256
# An Encoding makes its list of places in one call, which holds the GIL for as long.
MANY_TOKENS = 32 << 10
# How many of the first ids stay, and where the last that stay begin
Parts = Callable[[Sequence[int]], tuple[int, int]]


class UntokenizableText(ValueError):
    """The text has a character the vocabulary lacks, at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the vocabulary lacks the character at offset {offset}")
        self.offset = offset


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    offsets: list[tuple[int, int]]  # character ranges of the text, one an id
    cut: bool = False  # whether ids were left out


class Tokenizer:
    """The `tokenizers` library's own format, strict: a text is encoded whole or refused."""

    def __init__(self, backend: Backend) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        added = backend.get_added_tokens_decoder().values()
        special = [str(token) for token in added]
        self._swallows_spaces = any(token.lstrip or token.rstrip for token in added)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._known: set[str] = set()
        self._texts: dict[int, str] = {}
        # Bytes or an unknown token stand in for any character where they stand in for this one.
        self._complete = self._has_token("\U0010fffd")
        rewrites = backend.normalizer is not None or getattr(backend.model, "unk_token", None)
        longest = max(map(len, backend.get_vocab()), default=0)
        # A tokenizer that splits at spaces and drops them may drop any white space.
        self._drops_spaces = not self._has_token(" ")
        self._longest = 0 if rewrites or self._drops_spaces else longest

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        return cls(Backend.from_file(str(path)))

    @classmethod
    def of_characters(cls, stoi: Mapping[str, int], special: Sequence[str] = ()) -> "Tokenizer":
        """One id a character, by a training vocabulary. Raises ValueError for longer entries."""
        for entry in stoi:
            if len(entry) != 1 and entry not in special:
                raise ValueError(f"vocabulary entry {entry!r} is neither a character nor special")
        backend = Backend(models.BPE(vocab=dict(stoi), merges=[]))
        backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
        backend.decoder = decoders.Fuse()
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, parts: Parts | None = None) -> Tokens:
        """With `parts`, those that stay alone: a place is made of them, not of each of a million.

        Raises UntokenizableText where a character has no token.
        """
        self._refuse_unknown(text)
        encoding = self._encoding(text)
        ids = encoding.ids
        head, tail = parts(ids) if parts is not None else (len(ids), len(ids))
        if head == len(ids) <= MANY_TOKENS:
            return Tokens(ids, encoding.offsets)
        kept = [*range(head), *range(tail, len(ids))]
        offsets = [encoding.token_to_chars(i) or (0, 0) for i in kept]
        return Tokens([ids[i] for i in kept], offsets, cut=head < len(ids))

    def _encoding(self, text: str) -> Encoding:
        if len(text) <= LONG:
            return self.backend.encode(text)
        return self.backend.encode_batch([text])[0]

    def count_beyond(self, text: str, most: int) -> int | None:
        """Returns a number of tokens above `most` that the text has at least, None if it has fewer.

        A text of few more tokens than that can be None too. No more of it is encoded than needed.
        """
        found = self._end_of(text, most)
        return None if found is None else found[1]

    def head(self, text: str, most: int) -> str:
        """The beginning of a text, whose first `most` tokens are those of the whole text.

        Raises UntokenizableText where a character, be it behind the beginning, has no token.
        """
        if len(text) > PIECE:
            self._refuse_unknown(text)
        found = self._end_of(text, most)
        return text if found is None else text[: found[0]]

    def _end_of(self, text: str, most: int) -> tuple[int, int] | None:
        """Where the first pieces end that have over `most` tokens, and how many they have.

        A piece ends at a white space if it has one near its end; elsewhere some of the tokens
        around are not those of the whole text, and do not count.
        """
        start, counted = 0, 0
        while len(text) - start > PIECE:
            end = start + PIECE
            space = text.rfind(" ", end - LONG, end)
            end = end if space <= start else space
            counted += len(self._encoding(text[start:end])) - TOKENS_OF_A_CUT
            start = end
            if counted > most:
                return end, counted
        return None

    def least_tokens(self, text: str, most: int) -> int:
        """How many tokens the text has at least, by its length alone; 0 where that tells nothing.

        No token stands for more characters than its entry has, unless the tokenizer rewrites the
        text, drops parts of it, or has one unknown token for many characters. Counts no further
        than it takes to see that they are over `most`.
        """
        if not self._longest:
            return 0
        if not self._swallows_spaces:
            return len(text) // self._longest
        counted = 0
        for start in range(0, len(text), PIECE):
            counted += len("".join(text[start : start + PIECE].split()))
            if counted // self._longest > most:
                break
        return counted // self._longest

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """`decode` of one token, remembered."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.decode([token])
        return text

    @cached_property
    def _text_bytes(self) -> NDArray[np.int64]:
        """The most bytes of each id's text in JSON, by the length of its entry."""
        vocabulary = self.backend.get_vocab()
        most = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
        for entry, token in vocabulary.items():
            most[token] = BYTES_OF_A_CHARACTER * len(entry)
        return most

    @cached_property
    def _longest_texts(self) -> NDArray[np.int64]:
        """The bytes of the n longest texts together, at n - 1."""
        return np.cumsum(np.sort(self._text_bytes)[::-1])

    def most_text_bytes(self, ids: NDArray[np.int64]) -> int:
        """The most bytes that the texts of these ids have in JSON. Any number is taken as an id."""
        return int(np.take(self._text_bytes, ids, mode="clip").sum())

    def longest_texts(self, count: int) -> int:
        """The most bytes that the texts of `count` different ids have in JSON."""
        return int(self._longest_texts[min(count, len(self._longest_texts)) - 1])

    def _refuse_unknown(self, text: str) -> None:
        # A model without an unknown token drops what it lacks and shifts the offsets behind it,
        # so characters are looked up before encoding, each once in this object's life.
        if self._complete:
            return
        unknown = {c for c in set(self._special.sub("", text)) if not self._knows(c)}
        if unknown:
            plain = self._special.sub(lambda match: "\0" * len(match[0]), text)
            offsets = (i for i, c in enumerate(plain) if c in unknown and text[i] == c)
            raise UntokenizableText(next(offsets))

    def _knows(self, character: str) -> bool:
        if character in self._known:
            return True
        dropped = self._drops_spaces and character.isspace()
        if dropped or self._has_token(character):
            self._known.add(character)
            return True
        return False

    def _has_token(self, character: str) -> bool:
        return bool(self.backend.encode(character, add_special_tokens=False).ids)

    def save(self, path: Path) -> None:
        self.backend.save(str(path))
