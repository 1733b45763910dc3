"""TrunkFolder: a backbone folder on the command line, or the word `demo`."""

from pathlib import Path
from typing import Any

import click

from model.demo import FOLDER

DEMO = Path("demo")


class TrunkFolder(click.Path):
    """`demo` is the trunk that the package ships, unless there is a folder of this name."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        folder = super().convert(value, param, ctx)
        return FOLDER if folder == DEMO and not DEMO.exists() else folder
