"""Starts the command line of the installation that this file belongs to.

Its packages have common names: with PYTHONPATH=. a folder that holds a `model.py` or a `server/`
of its own would be imported in their place. This package is therefore installed under a name of its
own (`trunkline_launcher`; `trunkline` for `python -m trunkline`), imports nothing of the others
until it has made sure where they are found, and leaves every other import as it is.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OWN = frozenset({"adapters", "loadtest", "model", "server"})


class OwnPackages:
    """A finder on sys.meta_path: the names of OWN are found in `root` alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self.root)]) if name in OWN else None


def root_of(file: Path) -> Path:
    """The folder that holds the packages: of a source tree, or where a wheel is installed."""
    package = file.resolve().parent
    in_server = (package.parent / "cli" / "__init__.py").exists()
    return package.parent.parent if in_server else package.parent


def main() -> None:
    root = root_of(Path(__file__))
    missing = [name for name in sorted(OWN) if not (root / name).is_dir()]
    if missing:
        sys.exit(f"trunkline: {root} lacks its own package {missing[0]}; install trunkline again")
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]  # somebody else's, imported before
    sys.meta_path.insert(0, OwnPackages(root))
    import_module("server.cli").main(prog_name="trunkline")


if __name__ == "__main__":
    main()
