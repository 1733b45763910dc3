"""A client that an existing generator makes of the OpenAPI document works with the server."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import TINY, Served, save_random_adapter
from reference import Oracle

NAME = "trunkline_client"
CONFIG = {"post_hooks": [], "package_name_override": NAME}  # formatting it would take a second
Modules = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def generated(tiny_server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Modules]:
    """The modules of the package, by their names in it."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    command = [
        Path(sys.executable).with_name("openapi-python-client"),
        *("generate", "--url", f"{tiny_server.url}/openapi.json", "--meta", "none"),
        *("--config", folder / "config.yaml", "--output-path", folder / NAME),
        "--fail-on-warning",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield lambda name: importlib.import_module(f"{NAME}.{name}")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def client(generated: Modules, tiny_server: Served):
    """What the generated functions take; it raises for a status that the document lacks."""
    make = generated("client").AuthenticatedClient
    with make(tiny_server.url, "none", raise_on_unexpected_status=True) as made:
        yield made


def test_its_embeddings_are_the_servers(generated: Modules, client, tiny: Oracle) -> None:
    models = generated("models")
    body = models.EncodeRequest(inputs=["To be", "or not"], adapters=["plain", "base"])
    answer = generated("api.inference.encode").sync(client=client, body=body)
    assert isinstance(answer, models.EncodeAnswer)
    assert [row.adapter and row.adapter.name for row in answer.data] == ["plain", None] * 2
    assert answer.usage.prompt_tokens == 2 * len("To beor not")
    wanted = tiny.embedding(tiny.ids("To be"), "plain").numpy()
    np.testing.assert_allclose(answer.data[0].embedding, wanted, atol=2e-4)


def test_its_other_answers_are_typed(generated: Modules, client) -> None:
    models, text = generated("models"), "To be"
    body = models.CriticRequest(inputs=text, adapter="full")
    row = generated("api.inference.critic").sync(client=client, body=body).data[0]
    assert "".join(token.text for token in row.tokens) == text
    assert all(0 <= token.wrongness <= 1 for token in row.tokens)
    body = models.ClassifyRequest(inputs=text, adapter="full", top_k=2)
    row = generated("api.inference.classify").sync(client=client, body=body).data[0]
    assert row.labels[0].score >= row.labels[1].score
    tokens = generated("api.tokenizer.tokenize").sync(
        client=client, body=models.TokenizeRequest(inputs=text)
    )
    ids = [token.id for token in tokens.data[0].tokens]
    back = generated("api.tokenizer.detokenize").sync(
        client=client, body=models.DetokenizeRequest(ids=ids)
    )
    assert back.text == text
    assert generated("api.operations.info").sync(client=client).config.n_embd == 16
    assert "trunkline_" in generated("api.operations.metrics").sync(client=client)


def test_it_uploads_lists_and_deletes_adapters(generated: Modules, client, tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    digest = generated("api.operations.info").sync(client=client).backbone.digest
    save_random_adapter(file, TINY, digest, 77)
    with file.open("rb") as stream:
        put = generated("api.adapters.put_adapter").sync_detailed(
            "made", client=client, body=generated("types").File(payload=stream)
        )
    assert put.status_code == 201
    listed = generated("api.adapters.list_adapters").sync(client=client)
    assert "made" in [adapter.name for adapter in listed.data]
    one = generated("api.adapters.get_adapter").sync("made", client=client)
    assert one.digest == put.parsed.digest
    gone = generated("api.adapters.delete_adapter").sync_detailed("made", client=client)
    assert gone.status_code == 200


def test_its_errors_are_parsed(generated: Modules, client) -> None:
    models = generated("models")
    body = models.EncodeRequest(inputs="To be", adapter="nobody")
    answer = generated("api.inference.encode").sync_detailed(client=client, body=body)
    assert answer.status_code == 404
    assert isinstance(answer.parsed, models.Error)
    assert answer.parsed.error.code == "adapter_not_found"
    assert answer.parsed.error.request_id == answer.headers["x-request-id"]
    body = models.EmbeddingsRequest(model="nobody", input_="To be")
    answer = generated("api.openai.embeddings").sync_detailed(client=client, body=body)
    assert isinstance(answer.parsed, models.OpenAIError)
    assert answer.parsed.error.code == "adapter_not_found"
