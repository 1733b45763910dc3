"""Training data in: JSONL or plain text, also .xz, read line by line and refused by line."""

import json
import lzma
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from model.tokenizer import Tokenizer, Tokens, UntokenizableText


class DataError(ValueError):
    """A file of training data, or a line of it, is not as the objective needs it."""

    def __init__(self, path: Path, line: int | None, what: str) -> None:
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {what}")
        self.path, self.line = path, line


@dataclass(frozen=True)
class Row:
    path: Path
    line: int  # from 1
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name!r} must be a text that is not empty")
        return value

    def error(self, what: str) -> DataError:
        return DataError(self.path, self.line, what)


def read_rows(path: Path, fields: Sequence[str]) -> list[Row]:
    """The rows of a .jsonl file, or of a text file, whose lines are rows of one field.

    Blank lines don't count. Raises DataError for a file without rows and for a row without one of
    the fields.
    """
    rows = list(_rows(path, fields))
    if not rows:
        raise DataError(path, None, "the file is empty")
    return rows


def sample_rows(path: Path, field: str, count: int, seed: int) -> list[Row]:
    """At most `count` rows, each as likely as any other; no more are in memory at a time.

    Reservoir sampling (Vitter 1985, algorithm R). Raises DataError as read_rows.
    """
    dice, kept = random.Random(seed), list[Row]()
    for number, row in enumerate(_rows(path, [field])):
        if number < count:
            kept.append(row)
        elif (place := dice.randrange(number + 1)) < count:
            kept[place] = row
    if not kept:
        raise DataError(path, None, "the file is empty")
    return kept


def _rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    is_text = ".jsonl" not in path.suffixes
    if is_text and len(fields) != 1:
        raise DataError(path, None, f"fields {', '.join(fields)} need a .jsonl or .jsonl.xz file")
    for number, line in _lines(path):
        if line.strip():
            value = {fields[0]: line} if is_text else _parse(path, number, line)
            row = Row(path, number, value)
            missing = [name for name in fields if name not in value]
            if missing:
                raise row.error(f"the field {missing[0]!r} is missing")
            yield row


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8").rstrip("\r\n")
    except OSError as error:
        raise DataError(path, None, error.strerror or str(error)) from error
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(path, None, f"not an .xz file, or cut short: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(path, number, "not UTF-8") from error


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(path, number, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(path, number, "a row must be a JSON object")
    return value


def tokens_of(row: Row, name: str, tokenizer: Tokenizer, block_size: int | None) -> Tokens:
    """A field's tokens, of which None for block_size sets no limit.

    Raises DataError for what does not fit or can't be written in tokens.
    """
    try:
        tokens = tokenizer.encode(row.text(name))
    except UntokenizableText as error:
        raise row.error(f"{name!r}: {error}") from error
    if block_size is not None and len(tokens.ids) > block_size:
        raise row.error(f"{name!r} has {len(tokens.ids)} tokens, more than block_size {block_size}")
    return tokens
