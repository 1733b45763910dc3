"""docs/clients.md shows the programs that the tests run, and a row for each client."""

from clients.catalogue import ALL, PROGRAMS
from clients.environments import version_of
from clients.page import PAGE, blocks, rewritten, table


def test_blocks_are_the_programs_that_are_run() -> None:
    shown = blocks(PAGE.read_text("utf-8"))
    assert len(shown) >= 12
    for name, code in shown.items():
        assert code == (PROGRAMS / name).read_text("utf-8"), name


def test_the_table_has_every_client_at_its_pinned_version() -> None:
    rows = table(PAGE.read_text("utf-8")).splitlines()[2:]
    named = {tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows}
    expected = {(c.name, version_of(c.package, c.environment, c.kind)) for c in ALL}
    assert expected <= named
    assert {name for name, _ in named - expected} <= {
        "Java `HttpClient` (java.net.http)",
        "`curl --http2`",
    }


def test_the_page_is_rewritten_from_programs_and_table_alone() -> None:
    text = PAGE.read_text("utf-8")
    assert rewritten(text, table(text)) == text
    assert "| new |" in rewritten(text, "| new |\n")
