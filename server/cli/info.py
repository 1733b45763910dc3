"""trunkline info: what a running server serves, and within which limits."""

import click
from rich.console import RenderableType
from rich.filesize import decimal

from server.cli import tables
from server.cli.client import Answer, Server, on_server


def _shown(answer: Answer) -> RenderableType:
    body = answer.body
    backbone, config, slots = body["backbone"], body["config"], body.get("slots", {})
    heads = [head for head, is_there in backbone["heads"].items() if is_there]
    shape = (
        f"{config['n_layer']} layers, {config['n_embd']} wide, {config['n_head']} heads, "
        f"{config['vocab_size']} tokens, texts of up to {config['block_size']}"
    )
    facts = [
        ("Server", f"trunkline {body['version']}"),
        ("Backbone", f"{backbone['id']}, {tables.digest(backbone['digest'])}"),
        ("Shape", shape),
        ("Heads", ", ".join(heads) or "none"),
        ("Runs", f"{body['dtype']} on {body['device']} ({body['operators']} operators)"),
        ("Adapters", body["adapters"]),
    ]
    if {"resident", "used_bytes", "capacity_bytes"} <= set(slots):
        used, capacity = decimal(slots["used_bytes"]), decimal(slots["capacity_bytes"])
        facts.append(("Slots", f"{slots['resident']} resident, {used} of {capacity}"))
    limits = [(name.replace("_", " "), value) for name, value in body["limits"].items()]
    return tables.table(("What", ""), facts + limits)


@click.command()
@on_server(shown=_shown)
def info(server: Server) -> Answer:
    """Show what a running server serves: backbone, dtype, device, adapters, limits."""
    return server.call("GET", "/info")
