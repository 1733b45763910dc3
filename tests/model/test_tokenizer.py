"""Text to ids and back: offsets are characters of the text, and nothing is dropped in silence."""

from pathlib import Path

import numpy as np
import orjson
import pytest
from conftest import CHARACTERS, SPECIAL, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from model.tokenizer import Tokenizer, UntokenizableText
from model.vocabulary import learn_vocabulary

ALPHABET = [*"ab 😀𝕏é\n", *SPECIAL]  # two of them beyond the BMP, one of two UTF-8 bytes
VOCABULARY = {entry: number for number, entry in enumerate(ALPHABET)}
WIDE = Tokenizer.of_characters(VOCABULARY, SPECIAL)
LEARNT = learn_vocabulary(["the king of the sea"] * 9, 300)
entries = st.lists(st.sampled_from(ALPHABET))


def slices(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for start, end in tokenizer.encode(text).offsets]


@given(entries)
@settings(deadline=None)
def test_ids_and_offsets_are_those_of_each_character_and_special(parts: list[str]) -> None:
    text = "".join(parts)
    assert WIDE.encode(text).ids == [VOCABULARY[part] for part in parts]
    assert slices(WIDE, text) == parts


@given(entries)
@settings(deadline=None)
def test_decode_is_the_inverse_of_encode(parts: list[str]) -> None:
    text = "".join(parts)
    assert WIDE.decode(WIDE.encode(text).ids) == text


@given(entries, st.sampled_from("xX𝕐🦉́\x00\r"), entries)
@settings(deadline=None)
def test_the_first_character_the_vocabulary_lacks_is_refused_with_its_offset(
    before: list[str], unknown: str, after: list[str]
) -> None:
    head = "".join(before)
    with pytest.raises(UntokenizableText) as refused:
        WIDE.encode(head + unknown + "".join(after) + "x")
    assert refused.value.offset == len(head)


def test_a_character_that_only_a_special_token_has_is_refused_outside_of_it() -> None:
    with pytest.raises(UntokenizableText) as refused:
        WIDE.encode("a[MASK]bM")
    assert refused.value.offset == 8


def test_part_of_a_special_token_is_no_special_token() -> None:
    with pytest.raises(UntokenizableText) as refused:
        tiny_tokenizer().encode("a [MASK")
    assert refused.value.offset == 2


def test_white_space_beside_a_special_token_is_kept() -> None:
    text = " [MASK] [CLS] \n"
    assert slices(tiny_tokenizer(), text) == [" ", "[MASK]", " ", "[CLS]", " ", "\n"]


def test_an_empty_text_has_no_tokens() -> None:
    assert tiny_tokenizer().encode("").ids == []


def test_a_tokenizer_s_own_truncation_and_padding_are_off(tmp_path: Path) -> None:
    backend = tiny_tokenizer().backend
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_file(tmp_path / "tokenizer.json").encode("abcdefg").ids
    assert len(ids) == 7


def test_a_saved_tokenizer_reads_back_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "To be, [MASK] not!\n[CLS]"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.vocab_size == tokenizer.vocab_size == len(CHARACTERS) + len(SPECIAL)


def test_an_entry_of_two_characters_that_is_not_special_is_refused() -> None:
    with pytest.raises(ValueError, match="'ab' is neither a character nor special"):
        Tokenizer.of_characters({"a": 0, "ab": 1})


def test_a_tokenizer_with_an_unknown_token_takes_any_text() -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = Tokenizer(backend).encode("hello 😀 hello")
    assert tokens.ids == [1, 0, 1]
    assert tokens.offsets == [(0, 5), (6, 7), (8, 13)]


def test_a_byte_level_tokenizer_takes_any_text_and_gives_it_back() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    text = "naïve 😀\x00 text"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert slices(tokenizer, "a😀")[1:] == ["😀"] * 4  # its four bytes


def test_a_normalizer_s_characters_are_judged_after_it() -> None:
    backend = Backend(models.BPE({"a": 0, "b": 1}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("AbA").ids == [0, 1, 0]
    with pytest.raises(UntokenizableText):
        tokenizer.encode("AbC")


def test_a_tokenizer_that_splits_at_spaces_may_drop_them_and_nothing_else() -> None:
    backend = Backend(models.BPE({"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a \t b\n").offsets == [(0, 1), (4, 5)]
    with pytest.raises(UntokenizableText) as refused:
        tokenizer.encode("a c")
    assert refused.value.offset == 2


@given(st.lists(st.sampled_from([*CHARACTERS, *SPECIAL]), max_size=200))
def test_a_text_has_at_least_the_tokens_that_its_length_tells(parts: list[str]) -> None:
    tokenizer, text = tiny_tokenizer(), "".join(parts)
    assert tokenizer.least_tokens(text, 1 << 40) <= len(tokenizer.encode(text).ids)
    assert tokenizer.least_tokens("a" * 1_000_000, 1 << 40) > 100_000


def test_a_tokenizer_that_rewrites_the_text_tells_nothing_by_its_length() -> None:
    backend = Backend(models.BPE(vocab={"a": 0, " ": 1}, merges=[]))
    backend.normalizer = normalizers.Replace("aa", "a")
    assert Tokenizer(backend).least_tokens("a" * 1000, 1 << 40) == 0


@given(st.lists(st.sampled_from(["the", " ", "  ", "king", *SPECIAL]), max_size=60))
@settings(deadline=None)
def test_masks_that_swallow_spaces_leave_the_bound_true(parts: list[str]) -> None:
    text = "".join(parts)
    assert LEARNT.least_tokens(text, 1 << 40) <= len(LEARNT.encode(text).ids)


def test_a_mask_of_a_learnt_vocabulary_stands_for_a_word_and_its_space() -> None:
    word = LEARNT.encode("the king of the king").ids
    masked = LEARNT.encode("the [MASK] of the [MASK]").ids
    assert len(masked) == len(word) == 5
    assert [masked[i] for i in (0, 2, 3)] == [word[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("words", [1, 10, 2000])  # the last is encoded in the other way
@pytest.mark.parametrize("parts", [(0, 3), (3, 0), (1, 4), (3, 3)], ids=str)
def test_what_stays_of_a_cut_text_is_as_in_the_whole(words: int, parts: tuple[int, int]) -> None:
    tokenizer = tiny_tokenizer()
    text, (head, tail) = "[CLS]" + "To be, " * words, parts
    whole = tokenizer.encode(text)
    cut = tokenizer.encode(text, lambda ids: (head, len(ids) - tail))
    assert cut.ids == whole.ids[:head] + whole.ids[len(whole.ids) - tail :]
    assert cut.offsets == whole.offsets[:head] + whole.offsets[len(whole.ids) - tail :]
    assert (cut.cut, whole.cut) == (True, False)


LONG_TEXTS = ["to be or not " * 6000, "tobeornot" * 8000]


@pytest.mark.parametrize("text", LONG_TEXTS)
def test_the_head_of_a_long_text_is_short_and_its_tokens_are_counted_as_far(text: str) -> None:
    head, whole = LEARNT.head(text, 300), LEARNT.encode(text).ids
    assert len(head) <= 65_536 < len(text)
    assert LEARNT.encode(head).ids[:300] == whole[:300]
    found = LEARNT.count_beyond(text, 1000)
    assert found is not None
    assert 1000 < found <= len(whole)
    assert LEARNT.count_beyond(text, len(whole)) is None


def test_the_texts_of_ids_are_counted_from_above() -> None:
    ids = np.arange(LEARNT.vocab_size)
    texts = [len(orjson.dumps(LEARNT.text_of(int(token)))) - 2 for token in ids]
    assert all(LEARNT.most_text_bytes(ids[i : i + 1]) >= size for i, size in enumerate(texts))
    assert LEARNT.longest_texts(3) >= sum(sorted(texts)[-3:])
    assert LEARNT.most_text_bytes(np.array([-5, 1 << 40])) >= 0
