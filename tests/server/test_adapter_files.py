"""BAD_INPUTS, "Adapter files": each is refused with its reason, and leaves the store as it was."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from adapter_client import OCTETS, Adapters, adapters_of, assert_refused, read_answer, wait_until
from bad_files import HEADER_FAULTS, SET_FAULTS, WIDTH, A, B, file_of, set_bytes, set_faults
from conftest import TINY, Serve
from safetensors.torch import load, save

from model.config import LORA_SITES

HEAD = b"PUT /adapters/plain HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
CAP = 64 << 20  # more than the header of a million tensors


@pytest.fixture(scope="module")
def adapters(
    tiny_backbone: Path, serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapters]:
    """In bfloat16, where a finite number may become infinite."""
    data = tmp_path_factory.mktemp("files")
    served = serve_for_session(
        *(tiny_backbone, "--data", data, "--dtype", "bfloat16", "--max-adapter-bytes", str(CAP))
    )
    with adapters_of(served, data) as adapters:
        yield adapters


@pytest.fixture(scope="module")
def faults(adapters: Adapters) -> dict[str, tuple[bytes, str]]:
    return set_faults(adapters.digest)


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_file_with_a_faulty_header_changes_nothing(adapters: Adapters, fault: str) -> None:
    file, reason = HEADER_FAULTS[fault]
    with adapters.unchanged():
        assert_refused(adapters.put("plain", file), 422, "invalid_adapter", reason)


@pytest.mark.parametrize("fault", SET_FAULTS)
def test_a_set_that_the_backbone_cannot_apply_changes_nothing(
    adapters: Adapters, faults: dict[str, tuple[bytes, str]], fault: str
) -> None:
    file, reason = faults[fault]
    with adapters.unchanged():
        assert_refused(adapters.put("plain", file), 422, "invalid_adapter", reason)


def test_a_new_name_is_not_taken_by_a_refused_file(adapters: Adapters) -> None:
    with adapters.unchanged():
        assert_refused(adapters.put("fresh", b"junk"), 422, "invalid_adapter", "truncated")
        assert adapters.client.get("/adapters/fresh").status_code == 404


def test_what_is_infinite_in_the_serving_dtype_changes_nothing(adapters: Adapters) -> None:
    large = torch.ones(4, WIDTH)
    large[0, 0] = 3.4e38
    file = set_bytes(adapters.digest, {A: large})
    with adapters.unchanged():
        assert_refused(adapters.put("plain", file), 422, "invalid_adapter", "not_finite")


def test_finite_tensors_whose_forward_is_not_change_nothing(adapters: Adapters) -> None:
    huge = {A: torch.full((4, WIDTH), 1e30), B: torch.full((3 * WIDTH, 4), 1e30)}
    with adapters.unchanged():
        answer = adapters.put("plain", set_bytes(adapters.digest, huge))
        assert_refused(answer, 422, "invalid_adapter", "not_finite")


def test_a_million_empty_tensors_are_refused_from_the_first_bytes(adapters: Adapters) -> None:
    entry = '"{:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    file = file_of("{" + ",".join(entry.format(i) for i in range(1_000_000)) + "}")
    assert len(file) < CAP
    head = HEAD + b"content-length: %d\r\n\r\n" % len(file)
    with adapters.unchanged():
        # The rest is never sent: the answer can only come from these.
        answer = adapters.raw(head + file[:4096])
        assert_refused(answer, 422, "invalid_adapter", "header_too_large")
    with adapters.unchanged():
        whole = adapters.put("plain", file)
        assert_refused(whole, 422, "invalid_adapter", "header_too_large")


def test_a_declared_length_over_the_cap_is_refused_before_any_of_it(adapters: Adapters) -> None:
    with adapters.unchanged():
        answer = adapters.raw(HEAD + b"content-length: %d\r\n\r\n" % (CAP + 1))
        assert_refused(answer, 413, "body_too_large")


def test_a_body_without_a_length_is_refused_at_the_cap(adapters: Adapters) -> None:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    start = file_of(
        json.dumps({"a": {"dtype": "F32", "shape": [CAP], "data_offsets": [0, 4 * CAP]}})
    )
    # A chunk of four times the cap begins, and one byte more than the cap of it is sent.
    chunk = b"%x\r\n" % (4 * CAP) + start
    with adapters.unchanged():
        answer = adapters.raw(head + chunk, bytes(CAP - len(start)), b"\0")
        assert_refused(answer, 413, "body_too_large")


def test_a_cut_off_file_is_truncated_wherever_it_was_cut(adapters: Adapters) -> None:
    file = adapters.file(11, ranks=64)
    with adapters.unchanged():
        for length in (len(file) - 1, len(file) // 2, 100):
            assert_refused(
                adapters.put("plain", file[:length]), 422, "invalid_adapter", "truncated"
            )


def test_a_client_that_leaves_in_its_upload_leaves_nothing(adapters: Adapters) -> None:
    file = adapters.file(12)
    with adapters.unchanged():
        with adapters.connection() as connection:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(file) + file[:1000])
            wait_until(lambda: any((adapters.blobs / "incoming").iterdir()))
        wait_until(lambda: not any((adapters.blobs / "incoming").iterdir()))


def sha256(file: bytes) -> bytes:
    return hashlib.sha256(file).digest()


def test_a_declared_digest_that_is_not_the_bytes_changes_nothing(adapters: Adapters) -> None:
    file = adapters.file(13)
    other, right = sha256(b"other"), base64.b64encode(sha256(file)).decode()
    wrong = base64.b64encode(other).decode()
    declared = [
        ("x-content-sha256", other.hex()),
        ("x-content-sha256", ""),
        ("x-content-sha256", "sha256:" + other.hex()),
        ("content-digest", f"sha-256=:{wrong}:"),
        ("content-digest", f"sha-256=:{right}:, sha-256=:{wrong}:"),
        ("content-digest", "sha-256=::"),
    ]
    for header, value in declared:
        with adapters.unchanged():
            answer = adapters.client.put(
                "/adapters/plain",
                content=file,
                headers=[*OCTETS.items(), (header.encode(), value.encode("latin-1"))],
            )
            assert_refused(answer, 422, "invalid_adapter", "digest_mismatch")


def test_every_declared_digest_counts(adapters: Adapters) -> None:
    file = adapters.file(13)
    right, wrong = (base64.b64encode(sha256(each)).decode() for each in (file, b"other"))
    with adapters.unchanged():
        headers = [("content-digest", f"sha-256=:{each}:") for each in (right, wrong)]
        answer = adapters.client.put(
            "/adapters/plain", content=file, headers=[*OCTETS.items(), *headers]
        )
        assert_refused(answer, 422, "invalid_adapter", "digest_mismatch")


def test_a_right_digest_is_taken_in_both_headers(adapters: Adapters) -> None:
    file = adapters.file(14)
    value = base64.b64encode(sha256(file)).decode()
    headers = {
        "content-digest": f"md5=:AAAA:, sha-256=:{value}:",
        "x-content-sha256": sha256(file).hex().upper(),
    }
    answer = adapters.put("declared", file, headers)
    assert answer.status_code == 201
    assert answer.json()["digest"] == f"sha256:{sha256(file).hex()}"


def test_a_set_without_effect_is_refused_unless_that_is_wanted(adapters: Adapters) -> None:
    tensors = {
        name: torch.zeros_like(tensor) if name.endswith(".B.weight") else tensor
        for name, tensor in load(adapters.file(15)).items()
    }
    file = save(tensors, {"lora_alpha": "8"})
    with adapters.unchanged():
        assert_refused(adapters.put("plain", file), 422, "adapter_has_no_effect")
        wrong = adapters.put("plain", file, allow_zero="yes")
        assert_refused(wrong, 422, "validation_error")
    answer = adapters.put("zero", file, allow_zero="true")
    assert answer.status_code == 201
    assert answer.json()["probe_delta"] == 0
    assert adapters.embeddings("zero") == adapters.embeddings(None)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 415),
        ({"content-type": ""}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "br, identity"}, 415),
    ],
)
def test_another_type_or_encoding_is_refused_unread(
    adapters: Adapters, headers: dict[str, str], status: int
) -> None:
    with adapters.unchanged():
        answer = adapters.put("plain", adapters.file(16), headers)
        assert_refused(answer, status, "unsupported_media_type")


def test_health_answers_while_uploads_wait_for_their_bytes(adapters: Adapters) -> None:
    head = HEAD + b"content-length: 1000\r\n\r\n"
    with adapters.unchanged(), adapters.connection() as slow:
        slow.sendall(head + b"\1")
        assert adapters.client.get("/health").status_code == 200
        slow.sendall(b"\0" * 999)
        assert_refused(read_answer(slow), 422, "invalid_adapter", "not_safetensors")


def test_an_upload_answers_what_it_applies_and_how_much_that_moves(adapters: Adapters) -> None:
    ranks = {(0, "mlp.lora_fc"): 2, (1, "attn.lora_out"): 3}
    metadata = {"description": "for \N{SNOWMAN}", "license": "MIT"}
    file = set_bytes(
        adapters.digest, metadata=metadata, seed=17, ranks=ranks, norms=True, critic=True, classes=2
    )
    answer = adapters.put("told", file)
    assert answer.status_code == 201
    body = answer.json()
    assert body["applied"] == {
        "lora": {"0": {"mlp.lora_fc": 2}, "1": {"attn.lora_out": 3}},
        "norms": ["transformer.h.0.ln_1", "transformer.ln_f"],
        "critic": True,
        "calibration": False,
        "classifier": True,
        "sequence_head": False,
        "cls_embedding": False,
    }
    assert (body["name"], body["version"], body["rank"]) == ("told", 1, 3)
    assert body["digest"] == f"sha256:{hashlib.sha256(file).hexdigest()}"
    assert body["bytes"] == len(file)
    assert body["labels"] == ["label-0", "label-1"]
    assert body["metadata"] | metadata == body["metadata"]
    assert math.isfinite(body["probe_delta"])
    assert body["probe_delta"] > 0
    assert answer.headers["etag"] == '"1"'
    shown = adapters.client.get("/adapters/told").json()["versions"][0]
    assert {key: shown[key] for key in body if key != "name"} == {
        key: value for key, value in body.items() if key != "name"
    }


def test_every_site_of_every_layer_is_told(adapters: Adapters) -> None:
    body = adapters.put("every-site", adapters.file(18)).json()
    sites = dict.fromkeys(LORA_SITES, 4)
    assert body["applied"]["lora"] == {str(layer): sites for layer in range(TINY.n_layer)}


def test_an_error_never_exceeds_its_bound_nor_breaks_on_what_names_hold(
    adapters: Adapters,
) -> None:
    names = ["\N{PILE OF POO}" * 20_000, "\0" * 1000, "<script>" * 10, "\u202e\u200b", "secret"]
    for name in names:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        file = file_of(
            json.dumps({"__metadata__": {"lora_alpha": "1"}, name: entry}), b"\0\0\x80\x3f"
        )
        answer: httpx.Response = adapters.put("plain", file)
        assert_refused(answer, 422, "invalid_adapter", "unknown_tensor")
        assert name not in answer.json()["error"]["message"]
