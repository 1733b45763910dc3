"""What a server process uses at a moment: memory, threads, descriptors, disk, registry rows."""

import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

MB = 1 << 20
# The parts of the data folder, by the first name below it; the rest is counted as `other`.
PARTS = {
    "registry.sqlite": "registry",
    "registry.sqlite-wal": "wal",
    "registry.sqlite-shm": "wal",
    "blobs": "blobs",
    "incoming": "incoming",
    "quarantine": "quarantine",
}
DISK = (*dict.fromkeys(PARTS.values()), "other", "log")

Sample = dict[str, float]  # a value by column name


@dataclass(frozen=True)
class Sampler:
    """Reads /proc and the data folder of a running server. Nothing here raises for a file that
    vanishes meanwhile."""

    pid: int
    data: Path  # its data folder, with a folder a backbone below it
    log: Path
    metrics: urllib.request.Request

    def take(self) -> Sample:
        """MB of memory and of disk by part, counts, and the registry's rows by table."""
        sample = memory_of(self.pid) | {
            "threads": float(_status(self.pid, "Threads")),
            "descriptors": float(len(os.listdir(f"/proc/{self.pid}/fd"))),
        }
        sample |= {f"disk_{part}_mb": size / MB for part, size in self._disk().items()}
        sample |= {f"rows_{table}": float(count) for table, count in self._rows().items()}
        return sample | {"metric_series": float(self._series())}

    def _disk(self) -> Mapping[str, int]:
        sizes = dict.fromkeys(DISK, 0)
        for path, size in _files(self.data):
            # <data>/<backbone>/<part>..., and <data>/keys.json
            parts = path.relative_to(self.data).parts[1:] or ("",)
            # BlobStore keeps its own folders below blobs/
            part = next((PARTS[p] for p in reversed(parts) if p in PARTS), "other")
            sizes[part] += size
        sizes["log"] = self.log.stat().st_size if self.log.exists() else 0
        return sizes

    def _rows(self) -> Mapping[str, int]:
        file = next(self.data.glob("*/registry.sqlite"), None)
        if file is None:
            return {}
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as database:
                found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                names = [name for (name,) in found if not name.startswith("sqlite_")]
                counts = {
                    name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
                    for name in names
                }
                if "versions" in counts:
                    counts["live_versions"] = database.execute(
                        "SELECT count(*) FROM versions WHERE deleted_at IS NULL"
                    ).fetchone()[0]
                return counts
        except sqlite3.Error:
            return {}

    def _series(self) -> int:
        try:
            with urllib.request.urlopen(self.metrics, timeout=30) as answer:
                lines = answer.read().splitlines()
        except (urllib.error.URLError, OSError):
            return 0
        return sum(not line.startswith(b"#") for line in lines)


def memory_of(pid: int) -> Sample:
    """Resident, proportional and private memory of a process, and its peak, in MB."""
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0])
    private = fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)
    return {
        "rss_mb": fields.get("Rss", 0) / 1024,
        "pss_mb": fields.get("Pss", 0) / 1024,
        "uss_mb": private / 1024,
        "peak_mb": _status(pid, "VmHWM") / 1024,
    }


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file below, with the bytes it has; a link counts as nothing."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                yield path, path.lstat().st_size
            except FileNotFoundError:
                continue
