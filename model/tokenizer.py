"""Text <-> ids, with character offsets; nothing is dropped in silence."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Encoding, decoders, models
from tokenizers import Tokenizer as Backend

# Longer texts are encoded without the GIL, which takes a little longer.
LONG = 4096
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
        if head == len(ids):
            return Tokens(ids, encoding.offsets)
        kept = [*range(head), *range(tail, len(ids))]
        offsets = [encoding.token_to_chars(i) or (0, 0) for i in kept]
        return Tokens([ids[i] for i in kept], offsets, cut=True)

    def _encoding(self, text: str) -> Encoding:
        if len(text) <= LONG:
            return self.backend.encode(text)
        return self.backend.encode_batch([text])[0]

    def least_tokens(self, text: str) -> int:
        """How many tokens the text has at least, by its length alone; 0 where that tells nothing.

        No token stands for more characters than its entry has, unless the tokenizer rewrites the
        text, drops parts of it, or has one unknown token for many characters.
        """
        if not self._longest:
            return 0
        counted = "".join(text.split()) if self._swallows_spaces else text
        return len(counted) // self._longest

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """`decode` of one token, remembered."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.decode([token])
        return text

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
