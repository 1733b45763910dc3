"""Runs programs inside a client's own environment, one after the other, in one process.

Standard input: {"prelude": code, "programs": [code, ...], "packages": [name, ...]}. The last line
of standard output: {"versions": {name: version}, "outcomes": [{"vectors": ...}, {"scores": ...}, or
{"error": {"type": ..., "message": ...}}, ...]}.
"""

import contextlib
import io
import json
import sys
from importlib.metadata import version

RESULTS = ("vectors", "scores", "labels")  # the variables that a program leaves


def outcome(code: str) -> dict[str, object]:
    """What the program leaves, or the exception that it raises."""
    names: dict[str, object] = {"__name__": "program"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "program", "exec"), names)
    except Exception as error:
        kind = f"{type(error).__module__.partition('.')[0]}.{type(error).__qualname__}"
        return {"error": {"type": kind, "message": f"{error} {body_of(error)}"}}
    return {name: plain(names[name]) for name in RESULTS if name in names}


def body_of(error: Exception) -> str:
    """The answer's body, where an exception carries it and leaves it out of its message."""
    content = getattr(error, "content", b"")
    return content.decode() if isinstance(content, bytes) else ""


def plain(value: object) -> object:
    """Arrays as lists, numbers of numpy as numbers."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    exec(asked["prelude"], {})
    outcomes = [outcome(code) for code in asked["programs"]]
    versions = {package: version(package) for package in asked["packages"]}
    print(json.dumps({"versions": versions, "outcomes": outcomes}))
