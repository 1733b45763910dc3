"""What `trunkline serve` prints at its start: what is served, where, and a request to try."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

import click

from model.tokenizer import Tokenizer, UntokenizableText
from server import __version__
from server.keys import KeyRing
from server.state import ServerState

MAX_NAMES = 8  # of adapters, named at the start
TEXT = "To be, or not to be"


def facts(state: ServerState, keys: KeyRing, names: Sequence[str]) -> dict[str, Any]:
    return {
        "version": __version__,
        "backbone": state.backbone.id,
        "digest": state.backbone.digest,
        "dtype": state.dtype,
        "device": state.device,
        "operators": state.operators,
        "adapters": names[:MAX_NAMES],
        "adapter_count": state.library.registry.count(),
        "keys": str(keys.path) if keys.configured else None,
    }


def print_banner(state: ServerState, keys: KeyRing, names: Sequence[str], url: str) -> None:
    """With a request to try."""
    count = state.library.registry.count()
    shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    click.echo(
        f"trunkline {__version__}: {state.backbone.id}, {state.dtype} on {state.device} "
        f"({state.operators} operators), at {url}"
    )
    noun = "adapter" if count == 1 else "adapters"
    click.echo(f"{count} {noun}: {shown}" if names else "no adapters yet: the backbone alone")
    if keys.configured:
        click.echo(f"API keys: {keys.path}")
    click.echo(f"try: {_request(state, url, names[0] if names else None, keyed=keys.configured)}")


def _request(state: ServerState, url: str, adapter: str | None, keyed: bool) -> str:
    """A command that this very server answers with 200, written for a shell."""
    has_critic = "critic_head.weight" in state.backbone.tensors
    key = "-H 'authorization: Bearer KEY' " if keyed else ""
    body = {"adapter": adapter} if adapter else {}
    inputs = _inputs(state.backbone.tokenizer, state.backbone.config.block_size)
    place = _curl_address(url, "/critic" if has_critic else "/encode")
    return (
        f"curl -s {place} {key}-H 'content-type: application/json' \\\n"
        f"       -d {shlex.quote(json.dumps(body | {'inputs': inputs}))}"
    )


def _curl_address(url: str, path: str) -> str:
    """With loopback for an address that stands for all of the machine's."""
    if url.startswith("unix://"):
        return f"--unix-socket {shlex.quote(url.removeprefix('unix://'))} http://localhost{path}"
    url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    return shlex.quote(url + path)


def _inputs(tokenizer: Tokenizer, block_size: int) -> str | list[int]:
    """The text as far as the trunk takes it; a token's id where it has none of its characters."""
    for end in range(len(TEXT), 0, -1):
        text = TEXT[:end].rstrip()
        try:
            tokens = tokenizer.encode(text)
        except UntokenizableText:
            continue
        if 0 < len(tokens.ids) <= block_size:
            return text
    return [0]
