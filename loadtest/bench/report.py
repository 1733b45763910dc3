"""What was measured: a table for a person, one JSON line for a program."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import torch
from rich import box
from rich.table import Table

PACKAGES = (
    "trunkline",
    "torch",
    "numpy",
    "uvicorn",
    "uvloop",
    "starlette",
    "fastapi",
    "orjson",
    "peft",
    "sentence-transformers",
)
UNITS = ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def machine() -> str:
    """Processor, cores that this process may use, its vector units, memory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capabilities = torch.cpu.get_capabilities()
    units = [unit for unit in UNITS if capabilities.get(unit)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0))
    name = models[0] if models else platform.processor()
    return f"{cores} cores of {name} ({', '.join(units) or platform.machine()}), {memory:.0f} GiB"


def versions() -> dict[str, str]:
    """Of Python and of every package that has a part in a measurement."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Report:
    """Ratios and other numbers by their keys; a dotted key is a value in an object."""

    def __init__(self, **fixed: Any) -> None:
        self.values: dict[str, Any] = {"machine": machine(), "versions": versions(), **fixed}
        self._rows: list[tuple[str, str, str, str, str]] = []

    def ratio(
        self, section: str, what: str, key: str, values: Sequence[float], note: str = ""
    ) -> None:
        """Its median, and from the least to the largest of its rounds."""
        middle, spread = statistics.median(values), [min(values), max(values)]
        self._put(key, middle, spread)
        shown = f"{_short(spread[0])} to {_short(spread[1])}"
        self._rows.append((section, what, _short(middle), shown, note))

    def count(self, section: str, what: str, key: str, values: Sequence[int]) -> None:
        """A sum over the rounds, and its spread."""
        self._put(key, sum(values), [min(values), max(values)])
        self._rows.append((section, what, str(sum(values)), f"{min(values)} to {max(values)}", ""))

    def note(self, section: str, what: str, shown: str, note: str = "") -> None:
        """A line of the table alone."""
        self._rows.append((section, what, shown, "", note))

    def left_out(self, section: str, reason: str) -> None:
        self.values.setdefault("left_out", {})[section] = reason
        self._rows.append((section, "left out", "", "", reason))

    def _put(self, key: str, value: float, spread: list[float]) -> None:
        outer, _, inner = key.partition(".")
        if inner:
            self.values.setdefault(outer, {})[inner] = value
            self.values.setdefault(f"{outer}_spread", {})[inner] = spread
        else:
            self.values |= {outer: value, f"{outer}_spread": spread}

    def table(self) -> Table:
        made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        made.add_column("Section", no_wrap=True)
        made.add_column("What", overflow="fold")
        made.add_column("Median", justify="right", no_wrap=True)
        made.add_column("Spread", justify="right", no_wrap=True)
        made.add_column("Note", overflow="fold")
        before = ""
        for section, *cells in self._rows:
            made.add_row("" if section == before else section, *cells)
            before = section
        return made

    def line(self) -> str:
        rounded = _rounded(self.values)
        return orjson.dumps(rounded).decode()


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
