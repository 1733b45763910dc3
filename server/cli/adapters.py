"""trunkline adapters: the adapters of a running server."""

from collections.abc import Callable
from typing import Any

import click
from rich.console import RenderableType

from adapters.errors import BadName, VersionNotFound
from adapters.listing import SORTS
from adapters.names import CURRENT, check_alias, check_name, parse_reference
from server.cli import tables
from server.cli.client import Answer, Server, on_server, path_of
from server.cli.diff import diff, version_of
from server.cli.lazy import LazyGroup


@click.group(
    cls=LazyGroup,
    members={
        "export-peft": "server.cli.peft:export_peft_",
        "import-peft": "server.cli.peft:import_peft_",
        "pull": "server.cli.transfer:pull",
        "push": "server.cli.transfer:push",
    },
)
def adapters() -> None:
    """Push, list, promote and load the adapters of a running server.

    REFERENCE is a name, name@3 (a version), name@stable (an alias) or name@sha256:... (a digest,
    or its first 12 digits).
    """


@adapters.command()
@click.argument("q", default="", metavar="[TEXT]")
@click.option("--sort", type=click.Choice(SORTS), default="name", show_default=True)
@click.option("--desc", is_flag=True, help="The largest, or the last, first.")
@on_server(shown=lambda answer: tables.listing(answer.body))
def ls(server: Server, q: str, sort: str, desc: bool) -> Answer:
    """List all adapters, or those with TEXT in their name or in an alias.

    Rank, size and digest are the current version's.
    """
    rows = list(server.adapters(q=q, sort=sort, order="desc" if desc else "asc"))
    return Answer(200, {"object": "list", "data": rows, "next": None})


@adapters.command()
@click.argument("name")
@on_server(shown=lambda answer: tables.adapter(answer.body))
def show(server: Server, name: str) -> Answer:
    """Show what there is of NAME.

    Aliases and versions, what the current one changes, its metadata, the history.
    """
    return _get(server, name)


def _get(server: Server, name: str) -> Answer:
    check_name(name)
    return server.call("GET", path_of(name))


def _pointed(answer: Answer) -> RenderableType:
    body = answer.body
    before = f" (before: {body['previous']})" if body["previous"] else ""
    return (
        f"{body['name']}@{body['alias']} is version {body['version']}{before}, "
        f"generation {body['generation']}"
    )


_alias = click.option("--alias", default=CURRENT, show_default=True, help="The pointer to move.")


@adapters.command()
@click.argument("name")
@click.argument("version", type=click.IntRange(1))
@_alias
@on_server(shown=_pointed)
def promote(server: Server, name: str, version: int, alias: str) -> Answer:
    """Make VERSION the current one of NAME.

    Or an alias' one, with --alias. Requests under way keep theirs.
    """
    check_name(name)
    check_alias(alias)
    return server.call("PUT", path_of(name, "aliases", alias), json={"version": version})


@adapters.command()
@click.argument("name")
@_alias
@on_server(shown=_pointed)
def rollback(server: Server, name: str, alias: str) -> Answer:
    """Go back to the version before.

    Refused if another has moved the pointer meanwhile. A second rollback undoes the first.
    """
    check_alias(alias)
    pointer = _get(server, name).body["aliases"].get(alias, {})
    if not pointer.get("previous"):
        raise VersionNotFound(f"{name}@{alias} has no version before to go back to")
    return server.call(
        "PUT",
        path_of(name, "aliases", alias),
        json={"version": pointer["previous"]},
        headers={"if-match": f'"{pointer["generation"]}"'},
    )


def _resident(answer: Answer) -> RenderableType:
    body = answer.body
    words = ["in the slots" if body["resident"] else "not in the slots"]
    words += ["pinned" if body["pin_held"] else "pinned, not held"] if body["pinned"] else []
    words += _in_flight(body)
    return f"{body['name']}@{body['version']} is {', '.join(words)}"


def _pinned(answer: Answer) -> RenderableType:
    """A pin is answered before its load has ended."""
    loads = answer.body["pin_held"] and not answer.body["resident"]
    return f"{_resident(answer)}{'; it is being loaded' if loads else ''}"


def _in_flight(body: dict[str, Any]) -> list[str]:
    users = tables.count(body["in_flight"], "request")
    return [f"still used by {users}"] if body["in_flight"] else []


def _residency_command(
    action: str, help_: str, shown: Callable[[Answer], RenderableType] = _resident
) -> None:
    @adapters.command(action, help=help_)
    @click.argument("reference")
    @on_server(shown=shown)
    def command(server: Server, reference: str) -> Answer:
        parse_reference(reference)
        return server.call("POST", path_of(reference, action))


_residency_command("load", "Bring REFERENCE into the slots.")
_residency_command("unload", "Take REFERENCE out of the slots.")
_residency_command("pin", "Bring REFERENCE into the slots, exempt from eviction.", _pinned)
_residency_command("unpin", "Let REFERENCE be evicted again.")


def _removed(answer: Answer) -> RenderableType:
    body = answer.body
    what = body["name"] if body["version"] is None else f"{body['name']}@{body['version']}"
    return ", ".join([f"{what} is unpublished", *_in_flight(body)])


@adapters.command()
@click.argument("name")
@click.argument("version", type=click.IntRange(1), required=False)
@on_server(shown=_removed)
def rm(server: Server, name: str, version: int | None) -> Answer:
    """Unpublish NAME, or one VERSION of it.

    At once; requests under way are answered, then memory and disk are freed.
    """
    if "@" in name:
        raise BadName("give the version behind the name: rm NAME VERSION")
    check_name(name)
    rest = () if version is None else ("versions", str(version))
    return server.call("DELETE", path_of(name, *rest))


@adapters.command("diff")
@click.argument("a")
@click.argument("b")
@on_server(shown=lambda answer: tables.differences(answer.body))
def diff_(server: Server, a: str, b: str) -> Answer:
    """Show where A and B, two references, differ.

    Ranks, LayerNorms, heads, labels, metadata; and at every place the norm of what A changes, of
    what B changes, and of the difference, also as a part of the larger one.
    """
    first, second = parse_reference(a), parse_reference(b)
    versions = (
        version_of(_get(server, first.name).body, first),
        version_of(_get(server, second.name).body, second),
    )
    names = (first.name, second.name)
    a, b = (f"{n}@{v['version']}" for n, v in zip(names, versions, strict=True))
    weights = server.call("GET", "/diff", params={"a": a, "b": b}).body["weights"]
    return Answer(200, diff(names, versions, weights))


def _verified(answer: Answer) -> RenderableType:
    body = answer.body
    rows = [
        (entry["name"], version, fault or "sound")
        for entry in body.get("data", [body])
        for version, fault in entry["versions"].items()
    ]
    return (
        tables.table(("Name", "Version", "File"), rows, right=("Version",)) if rows else "no files"
    )


@adapters.command()
@click.argument("name", required=False)
@on_server(shown=_verified, fails=lambda answer: not answer.body["sound"])
def verify(server: Server, name: str | None) -> Answer:
    """Hash the stored files again.

    Of NAME, or of all adapters. Exits 1 where one is not what its digest says.
    """
    if name is not None:
        return _verify(server, name)
    data = [_verify(server, row["name"]).body for row in server.adapters()]
    sound = all(entry["sound"] for entry in data)
    return Answer(200, {"object": "list", "sound": sound, "data": data})


def _verify(server: Server, name: str) -> Answer:
    check_name(name)
    return server.call("POST", path_of(name, "verify"))
