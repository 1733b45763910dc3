"""What the tests of the routes share: the references, and a second trunk unlike the first."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, Serve, Served, random_adapter, random_gpt, save_random_adapter
from conftest import tiny_tokenizer as tokenizer
from reference import Oracle

from adapters.format import write_adapter
from model.checkpoint import backbone_tensors, write_backbone
from server.cli import main

# No biases, a matrix a layer, no heads, no [CLS]
BARE = dataclasses.replace(
    TINY,
    n_layer=3,
    bias=False,
    cls_token_id=None,
    add_critic_head=False,
    share_main_matrices=False,
    pooling="last",
)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing by two, and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tiny_backbone: Path) -> Oracle:
    return Oracle(tiny_backbone)


@pytest.fixture(scope="session")
def bare_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters: plain; judge, with a critic; calibrated, with its own table too; hot, whose
    classifier overflows. The backbone has a calibration table."""
    folder = tmp_path_factory.mktemp("bare") / "bare"
    tensors = backbone_tensors(BARE, random_gpt(BARE, 11).state_dict())
    digest = write_backbone(folder, BARE, tensors, tokenizer(), torch.linspace(0, 1, 100) ** 2)
    adapters = folder / "adapters"
    save_random_adapter(adapters / "plain.safetensors", BARE, digest, 1)
    save_random_adapter(adapters / "judge.safetensors", BARE, digest, 2, critic=True)
    calibrated = random_adapter(BARE, 3, critic=True) | {"calibration": torch.rand(100)}
    write_adapter(
        adapters / "calibrated.safetensors", calibrated, lora_alpha=8.0, base_digest=digest
    )
    hot = torch.full((1, BARE.n_embd), 3e38)
    write_adapter(
        adapters / "hot.safetensors",
        random_adapter(BARE, 4) | {"classifier.weight": torch.cat((hot, -hot))},
        lora_alpha=8.0,
        base_digest=digest,
        metadata={"labels": '["up", "down"]'},
    )
    save_random_adapter(adapters / "classes.safetensors", BARE, digest, 5, classes=4)
    return folder


@pytest.fixture(scope="session")
def bare(bare_backbone: Path) -> Oracle:
    return Oracle(bare_backbone)


@pytest.fixture(scope="session")
def bare_server(bare_backbone: Path, serve_for_session: Serve) -> Served:
    return serve_for_session(bare_backbone, "--dtype", "float32")


@dataclasses.dataclass(frozen=True)
class KeyedDemo:
    """The demo trunk as it stands, on a server that asks for this key."""

    served: Served
    key: str

    def client(self) -> httpx.Client:
        return self.served.client(headers={"authorization": f"Bearer {self.key}"})


@pytest.fixture(scope="session")
def keyed_demo(tmp_path_factory: pytest.TempPathFactory, serve_for_session: Serve) -> KeyedDemo:
    """Its import root is the folder of the demo's adapters."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    scopes = ("--scope", "infer", "--scope", "admin", "--scope", "metrics")
    made = CliRunner().invoke(main, ["keys", "--file", str(file), "new", *scopes])
    assert made.exit_code == 0, made.output
    root = Path(__file__).parent.parent.parent / "adapters" / "demo"
    return KeyedDemo(serve_for_session("--keys", file, "--import-root", root), made.stdout.strip())
