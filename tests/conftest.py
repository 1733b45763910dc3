"""Shared by all tests: the kit, tiny random trunks and adapters, real servers on free ports."""

import dataclasses
import fcntl
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import HealthCheck, settings
from stated import Document, demand_stated
from torch import Tensor

from adapters.format import write_adapter
from adapters.importers import import_checkpoint
from model.checkpoint import backbone_tensors, write_backbone
from model.config import LORA_SITES, GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer

# On a busy machine an example may take any time: that is no fault of what is tested
settings.register_profile("any-time", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-time")

KIT = Path(__file__).parent / "kit"
CHARACTERS = "\n !',-.:;?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPECIAL = ("[MASK]", "[PAD]", "[CLS]")

TINY = GPTConfig(
    block_size=64,
    vocab_size=len(CHARACTERS) + len(SPECIAL),
    n_layer=2,
    n_head=2,
    n_embd=16,
    mask_token_id=len(CHARACTERS),
    pad_token_id=len(CHARACTERS) + 1,
    cls_token_id=len(CHARACTERS) + 2,
    add_critic_head=True,
    use_lora_attn=True,
    use_lora_mlp=True,
    lora_rank=4,
    share_main_matrices=True,
)


def tiny_tokenizer() -> Tokenizer:
    stoi = {c: i for i, c in enumerate([*CHARACTERS, *SPECIAL])}
    return Tokenizer.of_characters(stoi, SPECIAL)


def random_gpt(config: GPTConfig, seed: int = 0) -> GPT:
    """A GPT whose every parameter is random, biases and LayerNorms too."""
    torch.manual_seed(seed)
    gpt = GPT(config).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return gpt


def random_adapter(
    config: GPTConfig,
    seed: int,
    *,
    ranks: Mapping[tuple[int, str], int] | int = 4,
    norms: bool = False,
    critic: bool = False,
    classes: int = 0,
    sequence: bool = False,
    cls: bool = False,
) -> dict[str, Tensor]:
    """Adapter tensors with B != 0: rank by (layer, site), or one rank for all of them."""
    torch.manual_seed(seed)
    width = config.n_embd
    if isinstance(ranks, int):
        sites = ((layer, site) for layer in range(config.n_layer) for site in LORA_SITES)
        ranks = dict.fromkeys(sites, ranks)
    tensors: dict[str, Tensor] = {}
    for (layer, site), rank in ranks.items():
        path, (into, out) = f"transformer.h.{layer}.{site}", LORA_SITES[site]
        tensors[f"{path}.A.weight"] = torch.randn(rank, into * width) * 0.1
        tensors[f"{path}.B.weight"] = torch.randn(out * width, rank) * 0.1
    if norms:
        for name in ("transformer.h.0.ln_1", "transformer.ln_f"):
            tensors[f"{name}.weight"] = 1 + torch.randn(width) * 0.1
            if config.bias:
                tensors[f"{name}.bias"] = torch.randn(width) * 0.1
    if critic:
        tensors["critic_head.weight"] = torch.randn(1, width)
    if classes:
        tensors["classifier.weight"] = torch.randn(classes, width)
        tensors["classifier.bias"] = torch.randn(classes)
    if sequence:
        tensors["sequence_head.base_predictor.weight"] = torch.randn(1, width) * 0.5
        tensors["sequence_head.A"], tensors["sequence_head.B"] = torch.randn(1), torch.randn(1)
    if cls:
        tensors["cls_embedding"] = torch.randn(width)
    return tensors


def save_random_adapter(path: Path, config: GPTConfig, digest: str, seed: int, **options) -> None:
    """A random adapter as a file; a classifier's labels are label-0, label-1, ..."""
    tensors = random_adapter(config, seed, **options)
    classes = options.get("classes", 0)
    labels = "[" + ", ".join(f'"label-{i}"' for i in range(classes)) + "]"
    metadata = {"labels": labels} if classes else {}
    write_adapter(path, tensors, lora_alpha=8.0, base_digest=digest, metadata=metadata)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where two processes share the tests, each waits for a test of the other that runs alone."""
    if not hasattr(item.config, "workerinput") or not hasattr(item.config, "cache"):
        return (yield)
    folder = item.config.cache.mkdir("alone")
    with in_the_room(folder, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def in_the_room(folder: Path, *, alone: bool) -> Iterator[None]:
    """Any number at a time, or one that is alone, which holds the door while it waits: or others
    would go in before it again and again."""
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def kit_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit's two checkpoints, imported: a backbone folder with two adapters."""
    out = tmp_path_factory.mktemp("kit") / "shakespeare"
    for name in ("ckpt_a", "ckpt_b"):
        import_checkpoint(KIT / f"{name}.pt", KIT / "meta.pkl", out)
    return out


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random trunk and adapters: plain, full (LayerNorms, critic, classifier), classes."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    gpt = random_gpt(TINY)
    digest = write_backbone(
        folder, TINY, backbone_tensors(TINY, gpt.state_dict()), tiny_tokenizer()
    )
    adapters = folder / "adapters"
    save_random_adapter(adapters / "plain.safetensors", TINY, digest, 1)
    save_random_adapter(
        adapters / "full.safetensors", TINY, digest, 2, norms=True, critic=True, classes=3
    )
    save_random_adapter(adapters / "classes.safetensors", TINY, digest, 3, classes=5)
    return folder


DOCUMENTS: list[Document] = []  # one: it is the same of every server


def document_of(url: str) -> Document:
    """The OpenAPI document, asked for once."""
    if not DOCUMENTS:
        DOCUMENTS.append(Document(httpx.get(f"{url}/openapi.json", timeout=60).json()))
    return DOCUMENTS[0]


@dataclasses.dataclass
class Served:
    """A server process, its address, and its log."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, **options) -> httpx.Client:
        """Every answer that it gets must be one that the OpenAPI document states."""
        hooks = {"response": [functools.partial(demand_stated, document_of(self.url))]}
        return httpx.Client(base_url=self.url, timeout=60, event_hooks=hooks, **options)

    def stop(self) -> int:
        """SIGTERM, wait, and the exit code; after 20 s SIGKILL."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start_server(
    log: Path, *arguments: str | Path, script: Path | None = None, **environment: str
) -> Served:
    """`trunkline serve ARGUMENTS` on a free port, ready; `script` in its place."""
    program = ["-m", "server.cli"] if script is None else [str(script)]
    command = [sys.executable, *program, "serve", "--port", "0", *map(str, arguments)]
    environment = {"TRUNKLINE_DATA_DIR": f"{log}.data"} | environment
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        url = next((w for w in log.read_text().split() if w.startswith("http://127")), None)
        if url is not None and _is_ready(url):
            return Served(process, url, log)
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def serve_for_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    yield from _server_factory(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers; they end with the test."""
    yield from _server_factory(tmp_path)


def _server_factory(folder: Path) -> Iterator[Serve]:
    running: list[Served] = []

    def start(*arguments: str | Path, **environment: str) -> Served:
        log = folder / f"server-{len(running)}.log"
        running.append(start_server(log, *arguments, **environment))
        return running[-1]

    yield start
    for served in running:
        if served.process.poll() is None:
            served.stop()


@pytest.fixture(scope="session")
def kit_server(kit_backbone: Path, serve_for_session: Serve) -> Served:
    """The kit in float32, the reference dtype."""
    return serve_for_session(kit_backbone, "--dtype", "float32")


@pytest.fixture(scope="session")
def tiny_server(tiny_backbone: Path, serve_for_session: Serve) -> Served:
    return serve_for_session(tiny_backbone, "--dtype", "float32")
