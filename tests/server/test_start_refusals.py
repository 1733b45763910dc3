"""The real command line on a data folder that lost something: one sentence, exit status 1, and the
way out of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import TINY, random_adapter

from adapters.format import adapter_bytes
from adapters.library import Library, Upload
from adapters.slots import SlotPool
from model.checkpoint import read_backbone
from model.encoder import Encoder
from server.app import create_app, data_folder
from server.cli import main
from server.keys import new_key
from server.settings import BadSettings, load_settings


@pytest.fixture
def data(tiny_backbone: Path, tmp_path: Path) -> Path:
    """A data folder with one adapter in it."""
    backbone = read_backbone(tiny_backbone)
    encoder = Encoder(backbone.config, backbone.tensors)
    folder = data_folder(load_settings({"data_dir": tmp_path / "data"}), backbone)
    library = Library(
        folder,
        backbone,
        encoder,
        lambda read: SlotPool(
            TINY, encoder.dtype, encoder.device, capacity_bytes=1 << 20, max_slots=0, read=read
        ),
    )
    incoming = library.store.incoming()
    incoming.write(adapter_bytes(random_adapter(TINY, 1), {"lora_alpha": "8.0"}))
    library.publish(Upload("held", "test"), incoming)
    incoming.discard()
    library.close()
    return tmp_path / "data"


def test_a_lost_registry_is_one_sentence_and_recover_is_a_way_out(
    tiny_backbone: Path, data: Path
) -> None:
    (registry,) = data.glob("*/registry.sqlite")
    registry.unlink()
    serve = [sys.executable, "-m", "server.cli", "serve", tiny_backbone, "--data", data]
    serve += ["--port", "0", "--dtype", "float32"]
    refused = subprocess.run(serve, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert f"registry {registry} is missing or empty" in refused.stderr.replace("\n", " ")
    assert f"trunkline restore BACKUP {data} --replace" in refused.stderr
    command = CliRunner()
    shown = command.invoke(main, ["recover", str(data)])
    assert shown.exit_code == 1
    assert "--accept-loss" in shown.output
    assert not registry.exists()
    done = command.invoke(main, ["recover", "--accept-loss", str(data)])
    assert done.exit_code == 0, done.output
    assert "was put into" in done.output
    assert command.invoke(main, ["recover", str(data)]).exit_code == 0
    assert len(list(data.glob("*/blobs/quarantine/*"))) == 1


@pytest.mark.parametrize("content", [None, "[]"])
def test_a_lost_keys_file_never_opens_a_server(
    tiny_backbone: Path, tmp_path: Path, content: str | None
) -> None:
    data = tmp_path / "data"
    keys = data / "keys.json"
    new_key(keys, "ci", scopes=["infer"])
    assert json.loads(keys.read_text())
    keys.unlink()
    if content is not None:
        keys.write_text(content)
    settings = {"backbone": tiny_backbone, "data_dir": data, "dtype": "float32"}
    with pytest.raises(BadSettings, match=r"keys.json is missing or has no key, but keys.mark"):
        create_app(load_settings(settings)).state.server.library.close()
