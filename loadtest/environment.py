"""The environment of the processes that a load run and the bench start."""

import os
from pathlib import Path


def own_packages() -> dict[str, str]:
    """The environment of a process that imports this installation's packages in any folder."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # without the current folder first
