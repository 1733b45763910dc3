"""A PEFT folder arrives as zip, tar, tar.gz, multipart, or below the import root."""

import gzip
import io
import itertools
import json
import re
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapter_client import Adapters, adapters_of, assert_refused
from conftest import Serve
from hypothesis import given
from hypothesis import strategies as st

from adapters.format import adapter_bytes, parse_adapter
from adapters.module_patterns import BadPattern, Patterns
from adapters.peft import CONFIG_FILE, TENSOR_FILE, PeftRefused, export_peft, import_peft
from adapters.peft_archive import Form, read_archive
from model.checkpoint import Backbone, read_backbone

CAP = 1 << 20
_names = (f"peft-{number}" for number in itertools.count())
Files = Mapping[str, bytes]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def adapters(tiny_backbone: Path, serve_for_session: Serve, root: Path) -> Iterator[Adapters]:
    data = root.parent / f"{root.name}-data"
    served = serve_for_session(
        *(tiny_backbone, "--data", data, "--dtype", "float32", "--import-root", root),
        *("--max-adapter-bytes", str(CAP)),
    )
    with adapters_of(served, data) as adapters:
        yield adapters


@pytest.fixture(scope="module")
def tiny(tiny_backbone: Path) -> Backbone:
    return read_backbone(tiny_backbone)


@pytest.fixture(scope="module")
def folder(tiny: Backbone, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder: LoRA of two ranks, LayerNorms, a critic head."""
    made = tmp_path_factory.mktemp("folder")
    full = tiny_backbone / "adapters" / "full.safetensors"
    export_peft(full, tiny, made / "peft")
    return made / "peft"


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE)}


@pytest.fixture(scope="module")
def converted(folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter file of the folder, by the command for files."""
    out = tmp_path_factory.mktemp("out") / "a.safetensors"
    import_peft(folder, tiny, out)
    return out.read_bytes()


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files: Files, format_: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def put(
    adapters: Adapters, name: str, body: bytes, kind: str = "application/zip", **more: str
) -> httpx.Response:
    headers = {"content-type": kind} | more
    return adapters.client.put(f"/adapters/{name}", content=body, headers=headers)


TAR, GZ = "application/x-tar", "application/gzip"
FORMS: dict[str, Callable[[Files], tuple[str, bytes]]] = {
    "zip": lambda f: ("application/zip", zipped(f)),
    "zip, stored": lambda f: ("application/x-zip-compressed", zipped(f, zipfile.ZIP_STORED)),
    "zip of a folder, as a Mac makes it": lambda f: (
        "application/zip",
        zipped(
            {"my adapter/": b""}
            | {f"my adapter/{n}": c for n, c in f.items()}
            | {f"__MACOSX/my adapter/._{n}": b"\0\5\x16\7" for n in f}
            | {"my adapter/.DS_Store": b"x", "my adapter/README.md": b"read me"}
        ),
    ),
    "zip with checkpoints inside": lambda f: (
        "application/zip",
        zipped({f"checkpoint-5/{n}": b"{}" for n in f} | dict(f)),
    ),
    "tar": lambda f: (TAR, tarred(f)),
    "tar of a folder, ustar": lambda f: (
        TAR,
        tarred({f"./a/{n}": c for n, c in f.items()}, tarfile.USTAR_FORMAT),
    ),
    "tar, GNU, long names": lambda f: (
        TAR,
        tarred({f"{'a' * 120}/{n}": c for n, c in f.items()}, tarfile.GNU_FORMAT),
    ),
    "tar, pax, long names": lambda f: (
        TAR,
        tarred({f"{'ä' * 120}/{n}": c for n, c in f.items()}),
    ),
    "tar.gz": lambda f: (GZ, gzip.compress(tarred(f))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_converted_to_the_file_that_the_command_makes(
    adapters: Adapters, files: Files, converted: bytes, form: str
) -> None:
    kind, body = FORMS[form](files)
    name = next(_names)
    answer = put(adapters, name, body, kind)
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == parse_adapter(bytearray(converted)).digest
    said = answer.json()["converted"]
    assert said["from"] == "peft"
    assert (said["lora"], said["folded"]) == (8, 0)
    assert said["saved"] == ["transformer.h.0.ln_1", "transformer.ln_f", "critic_head"]
    assert "target_modules" in said["dropped"]
    assert adapters.client.get(f"/adapters/{name}/file").content == converted
    again = put(adapters, name, body, kind)
    assert (again.status_code, again.headers["etag"]) == (200, '"1"')
    assert not any((adapters.blobs / "incoming").iterdir())


@pytest.mark.parametrize("by", ["file name", "field name"])
def test_a_form_of_two_files_is_converted(
    adapters: Adapters, files: Files, converted: bytes, by: str
) -> None:
    parts = [
        ("files", (f"sub/{name}", content)) if by == "file name" else (name, ("x", content))
        for name, content in files.items()
    ]
    answer = adapters.client.put(f"/adapters/{next(_names)}", files=parts)
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == parse_adapter(bytearray(converted)).digest


def renamed(files: Files, rename: Callable[[str], str], **more: torch.Tensor) -> Files:
    saved = parse_adapter(bytearray(files[TENSOR_FILE]))
    tensors = {rename(name): tensor for name, tensor in saved.tensors.items()} | more
    return {**files, TENSOR_FILE: adapter_bytes(tensors, saved.metadata)}


def _with_adapter(name: str) -> str:
    inner = name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight")
    head, _, last = inner.rpartition(".")
    return inner if "lora" in inner else f"{head}.modules_to_save.default.{last}"


PREFIX = "base_model.model."
RENAMES: dict[str, Callable[[str], str]] = {
    "no prefix": lambda n: n.removeprefix(PREFIX),
    "the adapter's name": _with_adapter,
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled below": lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled and distributed": lambda n: f"module._orig_mod.{n}",
    "distributed and compiled": lambda n: f"_orig_mod.module.{_with_adapter(n)}",
}


@pytest.mark.parametrize("how", RENAMES)
def test_names_of_every_saver_are_understood(
    adapters: Adapters, files: Files, converted: bytes, how: str
) -> None:
    answer = put(adapters, next(_names), zipped(renamed(files, RENAMES[how])))
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == parse_adapter(bytearray(converted)).digest


def test_the_trunks_own_modules_that_were_saved_too_are_dropped(
    adapters: Adapters, files: Files, converted: bytes
) -> None:
    original = {f"{PREFIX}transformer.ln_f.original_module.weight": torch.ones(16)}
    answer = put(adapters, next(_names), zipped(renamed(files, _with_adapter, **original)))
    assert answer.json()["digest"] == parse_adapter(bytearray(converted)).digest


def changed(files: Files, **fields: Any) -> Files:
    config = json.loads(files[CONFIG_FILE]) | fields
    return {**files, CONFIG_FILE: json.dumps(config).encode()}


def test_what_an_adapter_cant_express_is_refused_by_name(adapters: Adapters, files: Files) -> None:
    a = f"{PREFIX}transformer.h.0.attn"
    cases = {
        "use_dora is set": changed(files, use_dora=True),
        "bias is all": changed(files, bias="all"),
        "peft_type is VERA": changed(files, peft_type="VERA"),
        "LoRA on transformer.wte": renamed(
            files, str, **{f"{PREFIX}transformer.wte.lora_A.weight": torch.ones(4, 16)}
        ),
        "DoRA on transformer.h.0.attn.c_attn": renamed(
            files, str, **{f"{a}.c_attn.lora_magnitude_vector": torch.ones(48)}
        ),
        "more than one adapter": renamed(
            files, str, **{f"{a}.c_attn.lora_A.second.weight": torch.ones(4, 16)}
        ),
        "has rank 4, but adapter_config.json says 7": changed(files, r=7),
        "(not a plain word)": changed(files, peft_type="<script>\n"),
    }
    with adapters.unchanged():
        for sentence, case in cases.items():
            answer = put(adapters, "plain", zipped(case))
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_adapter")
            assert sentence in answer.json()["error"]["message"]


def linked_zip(files: Files, target: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(CONFIG_FILE, files[CONFIG_FILE])
        link = zipfile.ZipInfo(TENSOR_FILE)
        link.external_attr = 0o120777 << 16
        archive.writestr(link, target)
    return out.getvalue()


def special_tar(files: Files, kind: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(CONFIG_FILE)
        info.size = len(files[CONFIG_FILE])
        archive.addfile(info, io.BytesIO(files[CONFIG_FILE]))
        special = tarfile.TarInfo(TENSOR_FILE)
        special.type, special.linkname = kind, "/etc/passwd"
        archive.addfile(special)
    return out.getvalue()


def doubled(files: Files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(CONFIG_FILE, b"{}")
    return out.getvalue()


def with_directory(archive: bytes, offset: int, value: bytes) -> bytes:
    """The zip with other bytes in the first entry of its central directory."""
    at = archive.index(b"PK\1\2") + offset
    return archive[:at] + value + archive[at + len(value) :]


ZEROS = bytes(16 << 20)


def hostile(files: Files) -> dict[str, tuple[str, bytes]]:
    """By what is wrong: content type and body."""
    sound, stored, whole = zipped(files), zipped(files, zipfile.ZIP_STORED), tarred(files)
    many = {f"{i}.txt": b"" for i in range(1001)}
    extension = tarfile.TarInfo("x")
    extension.type, extension.size = b"x", 1 << 30
    empty = tarfile.TarInfo("x")
    empty.type = b"x"
    return {
        "empty": ("application/zip", b""),
        "text": ("application/zip", b"not an archive"),
        "text as tar": (TAR, b"not an archive" * 100),
        "text as gzip": (GZ, b"not an archive"),
        "cut off": ("application/zip", sound[:-30]),
        "a cut tar": (TAR, whole[:700]),
        "a cut tar.gz": (GZ, gzip.compress(whole)[:-20]),
        "a tar.gz with another checksum": (GZ, gzip.compress(whole)[:-8] + bytes(8)),
        "a zip as tar": (TAR, sound),
        "a bad checksum in the zip": ("application/zip", stored.replace(b'"r"', b'"q"', 1)),
        "a member before the file": ("application/zip", with_directory(sound, 42, b"\xff" * 4)),
        "a member behind the file": ("application/zip", with_directory(sound, 42, b"\0\0\xff\0")),
        "a member without a name": ("application/zip", with_directory(sound, 46, b"\0")),
        "a zip bomb": ("application/zip", zipped({**files, TENSOR_FILE: ZEROS})),
        "a config bomb": ("application/zip", zipped({**files, CONFIG_FILE: ZEROS})),
        "a tar.gz bomb": (GZ, gzip.compress(tarred({"big": ZEROS}))),
        "a tensor file over the cap": (
            GZ, gzip.compress(tarred({**files, TENSOR_FILE: bytes(CAP + 1)}))
        ),
        "too many members": ("application/zip", zipped(many)),
        "too many members of a tar": (GZ, gzip.compress(tarred(many))),
        "a huge pax header": (TAR, extension.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)),
        "many pax headers": (GZ, gzip.compress(empty.tobuf(tarfile.USTAR_FORMAT) * 100_000)),
        "a member twice": ("application/zip", doubled(files)),
        "a member twice in a tar": (TAR, tarred(files)[:-10240] + tarred(files)),
        "two folders": (
            "application/zip",
            zipped({f"{d}/{n}": c for n, c in files.items() for d in "ab"}),
        ),
        "a link": ("application/zip", linked_zip(files, "/etc/passwd")),
        "LZMA": ("application/zip", zipped(files, zipfile.ZIP_LZMA)),
        "a pickle": (
            "application/zip",
            zipped({CONFIG_FILE: files[CONFIG_FILE], "adapter_model.bin": b"\x80\2."}),
        ),
        "no config": ("application/zip", zipped({TENSOR_FILE: files[TENSOR_FILE]})),
        "no tensors": ("application/zip", zipped({CONFIG_FILE: files[CONFIG_FILE]})),
        "nothing": ("application/zip", zipped({})),
        "a form of one part": (
            'multipart/form-data; boundary="x"',
            b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n',
        ),
        "a form that is cut off": ("multipart/form-data; boundary=x", b"--x\r\n\r\n1"),
        "a form without its boundary in it": ("multipart/form-data; boundary=x", b"--y\r\n"),
    } | {
        f"a name {name!r}": ("application/zip", zipped({**files, name: b""}))
        for name in ("../up", "a/../../up", "/etc/passwd", "a\\b")
    } | {
        f"a special file {kind!r}": (TAR, special_tar(files, kind))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S")
    }  # fmt: skip


def test_a_hostile_archive_is_refused_and_leaves_nothing(adapters: Adapters, files: Files) -> None:
    with adapters.unchanged():
        for fault, (kind, body) in hostile(files).items():
            answer = put(adapters, "plain", body, kind)
            error = answer.json().get("error", {"code": answer.text})
            assert (answer.status_code, error["code"]) == (422, "invalid_adapter"), fault
            assert len(answer.content) < 600
            if fault == "a pickle":
                assert "safe_serialization=True" in error["message"]


def test_headers_of_an_upload_hold_for_a_folder_too(adapters: Adapters, files: Files) -> None:
    body = zipped(files)
    with adapters.unchanged():
        wrong = {"x-content-sha256": "0" * 64}
        refused = put(adapters, "plain", body, **wrong)
        assert_refused(refused, 422, "invalid_adapter", "digest_mismatch")
        coded = put(adapters, "plain", body, **{"content-encoding": "gzip"})
        assert_refused(coded, 415, "unsupported_media_type")
        assert_refused(put(adapters, "plain", bytes(CAP + 1)), 413, "body_too_large")
        assert_refused(put(adapters, "plain", body, "text/plain"), 415, "unsupported_media_type")
        form = put(adapters, "plain", body, "multipart/form-data")
        assert_refused(form, 400, "malformed_request")
        stale = put(adapters, "plain", body, **{"if-match": '"9"'})
        assert_refused(stale, 412, "version_conflict")


@given(st.binary(max_size=300), st.sampled_from(list(Form)), st.data())
def test_any_bytes_are_a_folder_or_refused(tmp_path_factory, noise, form, data) -> None:
    """Noise, and a sound archive with some of its bytes changed."""
    small = {CONFIG_FILE: b"{}", TENSOR_FILE: b"x"}
    sound = {
        Form.ZIP: zipped(small),
        Form.TAR: tarred(small)[:4096],
        Form.TAR_GZ: gzip.compress(tarred(small)),
        Form.MULTIPART: b"--b\r\ncontent-disposition: x; name=" + b"adapter_config.json"
        b"\r\n\r\n{}\r\n--b--",
    }[form]
    at = data.draw(st.integers(0, len(sound)))
    path = tmp_path_factory.getbasetemp() / "noise"
    for content in (noise, sound[:at] + noise + sound[at + len(noise) :], sound[:at]):
        path.write_bytes(content)
        with suppress(PeftRefused):  # any other error is a fault
            read_archive(path, form, 1000, "b")


@pytest.mark.parametrize("records", [b"0" * 65_536, b"1" * 65_536, b"-9 a=b\n" * 8192, b"5 a=b\n"])
def test_records_of_a_pax_header_are_read_once_or_refused(tmp_path: Path, records: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = b"x", len(records)
    block = header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    (tmp_path / "tar.gz").write_bytes(gzip.compress(block * 100 + bytes(1024)))
    began = time.process_time()
    with pytest.raises(PeftRefused, match="not sound"):
        read_archive(tmp_path / "tar.gz", Form.TAR_GZ, CAP)
    assert time.process_time() - began < 2


# The patterns of adapter_config.json

EVIL = ["(a*)*b", "(a|a)*b", "(a+)+b", "(.*)*x", "(a?)(a?)(a?)(a?)(a?)(a?)(a?)(a?)aaaaaaaa" * 8]


@pytest.mark.parametrize("pattern", EVIL)
def test_no_pattern_takes_exponential_time(pattern: str) -> None:
    began = time.process_time()
    assert Patterns([pattern]).match("a" * 60) is None
    assert time.process_time() - began < 5


def test_a_pattern_is_walked_once_for_all_modules() -> None:
    modules = [f"transformer.h.{layer}.attn.c_attn" for layer in range(100)]
    began = time.process_time()
    patterns = Patterns([".?" * 490 + "x"])
    assert not any(map(patterns.match, modules))
    assert time.process_time() - began < 5


SIMPLE = st.text(st.sampled_from("ab.*+?|()[]^$\\0-d"), max_size=10)


@given(SIMPLE, st.lists(st.text("ab.0", min_size=1, max_size=5), min_size=1, max_size=4))
def test_patterns_mean_what_python_says_or_are_refused(pattern: str, modules: list[str]) -> None:
    try:
        ours = Patterns([pattern])
    except BadPattern:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of possible nested sets
        for module in modules:
            theirs = re.match(rf"(.*\.)?({pattern})$", module)
            assert (ours.match(module) is not None) == (theirs is not None)


# vLLM's route.


def load(adapters: Adapters, name: str, path: str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path} | more
    return adapters.client.post("/v1/load_lora_adapter", json=body)


def test_vllms_route_converts_a_peft_folder(
    adapters: Adapters, root: Path, files: Files, converted: bytes
) -> None:
    (root / "tone").mkdir()
    for name, content in {**files, "README.md": b"read me"}.items():
        (root / "tone" / name).write_bytes(content)
    more = {"lora_int_id": 3, "base_model_name": "x", "load_inplace": None}
    answer = load(adapters, "tone", "tone", **more)
    assert answer.status_code == 200, answer.text
    assert answer.json()["digest"] == parse_adapter(bytearray(converted)).digest
    assert answer.json()["converted"]["lora"] == 8
    again = load(adapters, "tone", "tone")
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    assert load(adapters, "tone", "tone", load_inplace=True).json()["version"] == 1
    gone = adapters.client.post(
        "/v1/unload_lora_adapter", json={"lora_name": "tone", "lora_int_id": 3}
    )
    assert gone.status_code == 200


def test_vllms_route_follows_no_link_out_of_the_root_in_a_folder(
    adapters: Adapters, root: Path, files: Files
) -> None:
    (root.parent / "secret").write_bytes(files[TENSOR_FILE])
    (root / "linked").mkdir()
    (root / "linked" / CONFIG_FILE).write_bytes(files[CONFIG_FILE])
    with adapters.unchanged():
        assert load(adapters, "linked", "linked").status_code == 400
        (root / "linked" / TENSOR_FILE).symlink_to("../../secret")
        assert load(adapters, "linked", "linked").status_code == 403
        (root / "linked" / TENSOR_FILE).unlink()
        (root / "linked" / TENSOR_FILE).write_bytes(bytes(CAP + 1))
        assert load(adapters, "linked", "linked").status_code == 413


def test_a_converted_set_is_served_as_the_adapter_it_was(adapters: Adapters, files: Files) -> None:
    name = next(_names)
    assert put(adapters, name, zipped(files)).status_code == 201
    body = {"inputs": "to be", "adapters": [name, "full"], "outputs": ["embedding", "critic"]}
    ours, theirs = adapters.client.post("/encode", json=body).json()["data"]
    assert ours["embedding"] == theirs["embedding"]
    assert ours["critic"]["tokens"] == theirs["critic"]["tokens"]
