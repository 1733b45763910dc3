"""LazyGroup: commands that are imported when they are asked for; torch alone takes a second."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """`members` has a command's `module:attribute` by its name."""

    def __init__(self, members: Mapping[str, str], **options: Any) -> None:
        super().__init__(**options)
        self.members = members

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.members})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.members:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.members[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command
