"""docs/clients.md: its blocks are the programs that are run, its table is of `make clients`.

`python -m clients.page TABLE.md` compares the page's table with one that was just measured;
with `--write` it replaces the page's table and blocks.
"""

import re
import sys
from pathlib import Path

from clients.catalogue import PROGRAMS

PAGE = Path(__file__).parent.parent.parent / "docs" / "clients.md"
BLOCK = re.compile(r"<!-- program: (\S+) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(<!-- table: make clients -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def blocks(text: str) -> dict[str, str]:
    """The code of each block that a comment before it names, by program."""
    return {name: code for name, _, code in BLOCK.findall(text)}


def table(text: str) -> str:
    found = TABLE.search(text)
    assert found is not None, "docs/clients.md has no table of make clients"
    return found[2]


def rewritten(text: str, measured: str) -> str:
    text = TABLE.sub(lambda found: found[1] + measured + found[3], text)
    return BLOCK.sub(lambda found: block(found[1], found[2]), text)


def block(program: str, language: str) -> str:
    code = (PROGRAMS / program).read_text("utf-8")
    return f"<!-- program: {program} -->\n```{language}\n{code}```"


def main(measured: Path, *options: str) -> int:
    text, new = PAGE.read_text("utf-8"), measured.read_text("utf-8")
    if "--write" in options:
        PAGE.write_text(rewritten(text, new), encoding="utf-8")
        return 0
    if table(text) == new:
        return 0
    print("docs/clients.md has another table; WRITE=--write make clients replaces it")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
