"""Imports run one way: server's top, routes, engine, then adapters, then model; nothing upward."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "adapters", "server", "loadtest")

# The longest prefix of a module's name decides its level; a module imports its own level or lower.
LEVELS = {
    "model": 0,
    "adapters": 1,
    "server.settings": 0,  # the leaves: they import nothing of ours
    "server.metrics": 0,
    "server.logs": 0,
    "server.top": 0,
    "server.engine": 2,
    "server": 3,  # the edge: schemas, bodies, answers, middleware, ...
    "server.routes": 4,
    "server.app": 5,
    "server.cli": 5,
    "loadtest": 5,  # `trunkline bench` is the one command that imports of it
    "server.ray_deployment": 5,
}
LEAVES = ("server.settings", "server.metrics", "server.logs", "server.top")
TOP = ("server.app", "server.cli", "server.ray_deployment")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, functions' too, but for what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(path: Path) -> set[str]:
    """The modules a file imports when run; of `from a import b` a.b, where that is a module."""
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n in FILES else str(node.module) for n in names}
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def level_of(module: str) -> int:
    return LEVELS[max((p for p in LEVELS if is_within(module, p)), key=len)]


IMPORTS = {module: imports_of(path) for module, path in FILES.items()}
OURS = {module: {i for i in found if i in FILES} for module, found in IMPORTS.items()}
LAYERED = sorted(module for module in FILES if not is_within(module, "loadtest"))


def test_the_packages_were_found() -> None:
    assert {"model.gpt", "adapters.format", "server.app", "server.engine.loop"} < set(FILES)
    assert "model.config" in OURS["model.gpt"]


@pytest.mark.parametrize("module", LAYERED)
def test_a_module_imports_nothing_above_it(module: str) -> None:
    above = {i for i in OURS[module] - {"server"} if level_of(i) > level_of(module)}
    assert not above


def test_no_imports_go_in_a_circle() -> None:
    graphlib.TopologicalSorter(OURS).prepare()  # raises CycleError


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_of_the_server_imports_nothing_of_ours(leaf: str) -> None:
    assert OURS[leaf] <= ({"server.top"} if leaf == "server.metrics" else set())


def test_only_the_top_imports_the_top() -> None:
    for module in LAYERED:
        if not any(is_within(module, top) for top in TOP):
            assert not {i for i in OURS[module] if any(is_within(i, top) for top in TOP)}, module


def test_the_app_does_not_know_its_command_line() -> None:
    assert not {i for i in OURS["server.app"] if is_within(i, "server.cli")}


def test_the_engine_knows_no_web_framework() -> None:
    web = {"fastapi", "starlette", "uvicorn", "pydantic", "httpx"}
    for module in FILES:
        if is_within(module, "server.engine"):
            assert not {i.split(".")[0] for i in IMPORTS[module]} & web, module


def test_the_shapes_of_answers_are_for_the_document_alone() -> None:
    for module in FILES:
        if not is_within(module, "server.routes") and not is_within(module, "server.answer_shapes"):
            assert not {i for i in OURS[module] if is_within(i, "server.answer_shapes")}, module


# Functions of adapters that unlink no adapter file of a data folder.
OTHER_FILES = {  # whose own temporary files they unlink
    "adapters.staging.write_whole",
    "adapters.staging._move_into",
    "adapters.backup._snapshot",  # of the backup that is being written
    "adapters.backup._tar_at",
    "adapters.backup_format.drop",
    "adapters.restore._put_in_place",  # the mark that it is not done yet
    "adapters.reserve._give_up",  # the file that keeps space for deletes
    "adapters.storage_errors.refusal_to_write",  # its own probe
}


def is_library(module: str) -> bool:
    """Of model, but for the commands that made the demo beside its weights."""
    return is_within(module, "model") and not is_within(module, "model.demo")


def test_adapters_and_model_know_no_web_framework_and_no_command_line() -> None:
    web = {"fastapi", "starlette", "uvicorn", "pydantic", "httpx", "click", "rich"}
    for module in FILES:
        if is_within(module, "adapters") or is_library(module):
            assert not {i.split(".")[0] for i in IMPORTS[module]} & web, module


def test_model_is_a_library_of_torch_safetensors_tokenizers_and_numpy() -> None:
    allowed = {"model", "torch", "safetensors", "tokenizers", "numpy", *sys.stdlib_module_names}
    for module in FILES:
        if is_library(module):
            assert {i.split(".")[0] for i in IMPORTS[module]} <= allowed, module


def test_the_load_test_speaks_http_but_for_the_bench() -> None:
    for module in FILES:
        if is_within(module, "loadtest") and not is_within(module, "loadtest.bench"):
            assert all(is_within(i, "loadtest") for i in OURS[module]), module


def callers_of(method: str) -> set[str]:
    """Where in adapters a method of this name is called: `module.function`."""
    found = set()
    for module, path in FILES.items():
        if not is_within(module, "adapters"):
            continue
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
                names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
                found |= {f"{module}.{function.name}"} if method in names else set()
    return found


def test_a_published_file_is_unlinked_in_one_place() -> None:
    """Within the transaction that proves that no row names it: adapters/collector.py."""
    assert callers_of("unlink") - OTHER_FILES == {
        "adapters.collector._unlink_unnamed",  # calls the next, which nobody else does
        "adapters.store.unlink",
        "adapters.store.discard",  # an upload's own name
        "adapters.store.clear_incoming",  # uploads that a stop cut off
    }
    for method in ("rmtree", "remove", "rmdir"):
        assert not {c for c in callers_of(method) if is_within(c, "adapters.store")}
    movers = callers_of("replace") | callers_of("rename")
    assert {c for c in movers if is_within(c, "adapters.store")} == {
        "adapters.store._put_away",  # into quarantine
        "adapters.store._link",  # a copy of its own, where the file system has no links
    }


def test_nothing_imports_the_tests_or_the_load_test() -> None:
    for module in LAYERED:
        allowed = "loadtest.bench" if is_within(module, "server.cli") else None
        for i in IMPORTS[module]:
            assert not is_within(i, "tests"), module
            assert not is_within(i, "loadtest") or (allowed and is_within(i, allowed)), module


@pytest.mark.parametrize("name", ["utils", "util", "common", "helpers", "base", "misc"])
def test_every_file_has_a_noun_of_its_own(name: str) -> None:
    assert not [module for module in FILES if module.rpartition(".")[2] == name]
