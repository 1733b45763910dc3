"""The table of docs/clients.md: what `make clients` showed of each client."""

from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("client", "version", "adapter by `model`", "adapter in the base URL", "unknown adapter")
NOT_POSSIBLE = "–"


@dataclass
class Table:
    """Rows by client and version; a cell that no test has filled is not possible."""

    rows: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def fill(self, name: str, version: str, column: str, cell: str) -> None:
        self.rows.setdefault((name, version), {})[column] = cell

    def markdown(self) -> str:
        lines = [line(COLUMNS), line(["---"] * len(COLUMNS))]
        for (name, version), cells in self.rows.items():
            lines.append(line([name, version, *(cells.get(c, NOT_POSSIBLE) for c in COLUMNS[2:])]))
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        path.write_text(self.markdown(), encoding="utf-8")


def line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
