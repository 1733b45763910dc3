"""The import root: which files below it a request may publish, links followed."""

import os
from collections.abc import Callable
from pathlib import Path

from adapters.peft import TENSOR_FILE
from adapters.peft_config import CONFIG_FILE
from adapters.seeds import SUFFIX
from server.engine.errors import BadInput
from server.errors import RequestError

Owns = Callable[[str], bool]  # of an adapter's name, whether the request's key may use it


class ImportRoot:
    """One folder, as a request sees it. `owns` is None for a key that is not limited to adapters.

    A limited key reads what would be its own adapters if the folder were an adapter folder: its
    patterns must match the path below the root, without the suffix, as they match a name. That is
    checked before the disk is touched, and again when links have been followed.
    """

    def __init__(self, root: Path | None, owns: Owns | None) -> None:
        if root is None:
            raise RequestError("forbidden", "no import root is configured: set --import-root")
        self._root, self._owns = root, owns

    def find(self, lora_path: str) -> Path | tuple[Path, Path]:
        """The file that lora_path means; a folder's one file in it.

        Of a PEFT folder its two files: the configuration and the tensors.

        Raises RequestError, with one answer for a path outside the root and a path to nothing.
        """
        if "\0" in lora_path:
            raise BadInput("lora_path has a NUL")
        asked = self._root / lora_path
        self._check_own(Path(os.path.normpath(self._root)), Path(os.path.normpath(asked)))
        path = self._below(asked)
        self._check_own(self._root.resolve(), path)
        if os.path.isfile(path / CONFIG_FILE):
            config, tensors = (self._part(path, name) for name in (CONFIG_FILE, TENSOR_FILE))
            return config, tensors
        if os.path.isdir(path):
            files = list(path.glob(f"*{SUFFIX}"))
            if len(files) != 1:
                raise BadInput("a folder must have one safetensors file to be loaded")
            path = files[0]
        return self._file(path)

    def _part(self, folder: Path, name: str) -> Path:
        """A file of a PEFT folder, which is the key's own with all that is in it."""
        found = self._below(folder / name)
        if self._owns is not None and found.parent != folder:
            self._check_own(self._root.resolve(), found)
        return _plain(found)

    def _file(self, path: Path) -> Path:
        found = self._below(path)
        self._check_own(self._root.resolve(), found)
        return _plain(found)

    def _check_own(self, root: Path, path: Path) -> None:
        """Raises RequestError for what is below the root and is not the key's own."""
        if self._owns is None:
            return
        inside = path.is_relative_to(root)
        name = path.relative_to(root).as_posix().removesuffix(SUFFIX) if inside else ""
        if not inside or not self._owns(name):
            sentence = "the key may import what its adapter patterns match below the import root"
            raise RequestError("forbidden", f"lora_path: {sentence}", field="lora_path")

    def _below(self, path: Path) -> Path:
        try:
            resolved = path.resolve()
        except RuntimeError:  # a loop of links
            resolved = Path()
        if not resolved.is_relative_to(self._root.resolve()):
            raise RequestError("forbidden", "lora_path leads out of the import root")
        return resolved


def _plain(path: Path) -> Path:
    if not os.path.isfile(path):
        raise BadInput("lora_path is not a file below the import root, or a PEFT folder lacks one")
    return path
