"""One settings object: flags over the environment over the file over the defaults."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import Serve
from pydantic import ValidationError

from server.app import DEMO_ADAPTERS, DEMO_BACKBONE
from server.cli import main
from server.cli.client import DEFAULT_URL, Server
from server.cli.serve import serve
from server.engine.shares import Shares
from server.settings import BadSettings, Settings, load_settings, service_links, wanted


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"TRUNKLINE_{name.upper()}", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trunkline.toml"
    path.write_text("port = 1\nmax_inputs = 1\nmax_batch_tokens = 1\nthreads = 1\n")
    return path


def test_flags_win_over_the_environment_over_the_file_over_the_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_PORT", "2")
    monkeypatch.setenv("TRUNKLINE_MAX_INPUTS", "2")
    settings = load_settings({"port": 3}, file)
    assert settings.port == 3
    assert settings.max_inputs == 2
    assert settings.max_batch_tokens == 1
    assert settings.max_body_bytes == Settings().max_body_bytes


def test_without_anything_all_is_the_default() -> None:
    assert load_settings({}) == Settings()


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_value_means_the_same_from_everywhere(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flags = None, {}
    if source == "flag":
        flags = {"backbone": Path("some/trunk"), "dtype": "bfloat16", "receive_timeout_s": 1.5}
    elif source == "environment":
        monkeypatch.setenv("TRUNKLINE_BACKBONE", "some/trunk")
        monkeypatch.setenv("TRUNKLINE_DTYPE", "bfloat16")
        monkeypatch.setenv("TRUNKLINE_RECEIVE_TIMEOUT_S", "1.5")
    else:
        path = tmp_path / "trunkline.toml"
        path.write_text('backbone = "some/trunk"\ndtype = "bfloat16"\nreceive_timeout_s = 1.5\n')
    expected = Settings(backbone=Path("some/trunk"), dtype="bfloat16", receive_timeout_s=1.5)
    assert load_settings(flags, path) == expected


def test_other_programs_variables_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9")
    monkeypatch.setenv("XTRUNKLINE_PORT", "9")
    assert load_settings({}).port == Settings().port


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot = 1\n", "setting prot: no setting has this name, the nearest is port "),
        ("max-inputs = 1\n", "setting max-inputs: .* the nearest is max_inputs "),
        ("xyzzy = 1\n", "setting xyzzy: .* `trunkline serve --help` lists them all "),
        ('"a\\nb" = 1\n', r"setting a\?b: no setting has this name"),
        ("port = 70000\n", "setting port: it must be a whole number from 0 to 65535, not 70000 "),
        ('port = "many"\n', 'setting port: .*, not "many" '),
        ("port = {a = 1}\n", 'setting port: .*, not {"a": 1} '),
        ('dtype = "int4"\n', "setting dtype: .* one of auto, float32, bfloat16, int8, not "),
        ('device = "gpu"\n', "setting device: it must be auto, cpu, cuda or cuda:N, not "),
        ('adapter_memory = "2XB"\n', "setting adapter_memory: .*2GiB, .*65536 or more, not "),
        ("backbone = 3\n", "setting backbone: it must be a path, not 3 "),
        ("insecure = 3\n", "setting insecure: it must be true or false, not 3 "),
        (
            "receive_timeout_s = 0\n",
            "setting receive_timeout_s: it must be a number above 0, not 0 ",
        ),
        ("receive_timeout_s = nan\n", "setting receive_timeout_s: .*, not NaN "),
        ('[fair_shares]\na = "x"\n', "setting fair_shares: .* above 0 by adapter name"),
        (
            'otlp_endpoint = "collector:4318"\n',
            "setting otlp_endpoint: it must be an address that ",
        ),
        ("[fair_shares]\na = 0\n", "setting fair_shares: .* above 0 by adapter name"),
        ("[fair_shares]\na = -1\n", "setting fair_shares: .* above 0 by adapter name"),
        (f'host = ["{"x" * 9999}"]\n', "setting host: it must be a text, not .*xxx... "),
        ("port = \n", r"settings file .*bad\.toml: "),
        ("port = 1\nport = 2\n", r"settings file .*bad\.toml: "),
    ],
)
def test_a_bad_file_fails_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(BadSettings, match=sentence) as refused:
        load_settings({}, path)
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 400
    assert str(path) in said  # where the setting is from
    assert not re.search("Input should|Extra inputs|Value error", said)  # pydantic's words


@pytest.mark.parametrize("name", Settings.model_fields)
def test_what_every_setting_takes_can_be_said(name: str) -> None:
    assert wanted(name)


def test_a_missing_file_fails_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="nowhere"):
        load_settings({}, tmp_path / "nowhere.toml")


def test_an_unknown_variable_fails_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_PROT", "1")
    with pytest.raises(BadSettings, match=r"setting prot: .* port \(from TRUNKLINE_PROT\)"):
        load_settings({})


def test_settings_do_not_change_after_they_are_read() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_field_has_a_help_text_and_a_default(name: str) -> None:
    field = Settings.model_fields[name]
    assert field.description
    assert field.description.strip().endswith(".")
    assert not field.is_required()


# As the command line has it.


def test_the_command_line_shows_every_setting_with_its_help() -> None:
    shown = " ".join(CliRunner().invoke(main, ["serve", "--help"]).output.split())
    for name, field in Settings.model_fields.items():
        if name == "backbone":
            continue  # the argument
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description[:20] in shown


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--prot", "1"], {}, "--prot"),
        (["--port", "many"], {}, "'many' is not a valid integer"),
        (
            ["--port", "70000"],
            {},
            "setting port: it must be a whole number from 0 to 65535, not 70",
        ),
        (["--max-queue-s", "-1"], {}, "(from --max-queue-s)"),
        (["--device", "gpu"], {}, "setting device: it must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], {}, "setting device: cuda:99 is not there"),
        (["--adapters", "nowhere"], {}, "setting adapters: nowhere is not a folder"),
        (["--host", "no..where", "--insecure"], {}, "can't listen on no..where:8000: no address"),
        (["--dtype", "int4"], {}, "'int4' is not one of"),
        ([], {"TRUNKLINE_PROT": "1"}, "setting prot"),
        (["--config", "nowhere.toml"], {}, "nowhere.toml"),
        (["nowhere"], {}, "nowhere is not a backbone folder: no such folder"),
        ([__file__], {}, "a backbone folder: it is a file; `trunkline import` makes"),
        (["/"], {}, "/ is not a backbone folder: its config.json is missing; `trunkline import`"),
    ],
)
def test_a_bad_setting_ends_the_command_with_a_sentence_and_no_traceback(
    arguments: list[str], environment: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    environment = environment | {"TRUNKLINE_DATA_DIR": str(tmp_path)}
    result = CliRunner().invoke(main, ["serve", *arguments], env=environment)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert sentence in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RecursionError("maximum recursion depth exceeded"), "can't start: RecursionError"),
        (PermissionError(13, "Permission denied", "/a/file"), "/a/file: Permission denied"),
        (KeyError("ranks"), "can't start: KeyError"),
    ],
)
def test_no_fault_of_a_start_ends_in_a_traceback(
    error: Exception,
    sentence: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(settings: Settings) -> None:
        raise error

    monkeypatch.setattr("server.cli.serve.create_app", fails)
    monkeypatch.setattr("server.cli.serve.configure_logs", lambda *_: None)
    result = CliRunner().invoke(main, ["serve", "--log-format", form])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    said = caplog.text if form == "json" else result.output
    assert sentence in said
    assert "Traceback" not in said


@pytest.mark.parametrize("text", ["a = " + "[" * 50_000, "#" * (2 << 20)], ids=["deep", "large"])
def test_a_settings_file_that_is_deep_or_large_is_refused_by_name(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "deep.toml"
    file.write_text(text)
    with pytest.raises(BadSettings, match=r"settings file .*deep\.toml"):
        load_settings({}, file)


def test_bytes_may_have_units_as_a_flag_too() -> None:
    flags = ["--adapter-memory", "2GiB", "--max-adapter-bytes", "1 MiB"]
    given: dict[str, object] = {}
    command = click.Command(
        "serve", params=serve.params, callback=lambda **flags: given.update(flags)
    )
    command.main(flags, standalone_mode=False)
    settings = load_settings({name: value for name, value in given.items() if value is not None})
    assert (settings.adapter_memory, settings.max_adapter_bytes) == (2 << 30, 1 << 20)


def test_shares_in_the_environment_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_FAIR_SHARES", '{"acme/tone": 3}')
    assert load_settings({}).fair_shares == {"acme/tone": 3.0}
    monkeypatch.setenv("TRUNKLINE_FAIR_SHARES", "acme=3")
    with pytest.raises(BadSettings, match="fair_shares"):
        load_settings({})


def test_int8_where_it_cannot_be_ends_the_command_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.kernels.library", lambda: None)
    environment = {"TRUNKLINE_DATA_DIR": str(tmp_path)}
    result = CliRunner().invoke(main, ["serve", "--dtype", "int8"], env=environment)
    assert result.exit_code == 1
    assert "int8 needs the compiled operators" in result.output
    assert "Traceback" not in result.output


def test_the_demo_named_by_its_folder_has_its_adapters_too(serve: Serve) -> None:
    with serve(DEMO_BACKBONE).client() as client:
        names = [row["name"] for row in client.get("/adapters").json()["data"]]
    assert names == sorted(path.stem for path in DEMO_ADAPTERS.glob("*.safetensors"))
    assert len(names) == 5


def test_an_import_root_that_is_no_folder_ends_the_command_with_a_sentence(tmp_path: Path) -> None:
    typo = tmp_path / "ipmorts"
    environment = {"TRUNKLINE_DATA_DIR": str(tmp_path)}
    result = CliRunner().invoke(main, ["serve", "--import-root", str(typo)], env=environment)
    assert result.exit_code == 1
    assert f"{typo} is no folder" in result.output


SERVICE_LINKS = {
    "TRUNKLINE_PORT": "tcp://10.0.0.1:8000",
    "TRUNKLINE_SERVICE_HOST": "10.0.0.1",
    "TRUNKLINE_SERVICE_PORT": "8000",
    "TRUNKLINE_SERVICE_PORT_HTTP": "8000",
    "TRUNKLINE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "TRUNKLINE_PORT_8000_TCP_PROTO": "tcp",
    "TRUNKLINE_PORT_8000_TCP_PORT": "8000",
    "TRUNKLINE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "TRUNKLINE_METRICS_SERVICE_HOST": "10.0.0.2",
    "TRUNKLINE_METRICS_PORT": "tcp://10.0.0.2:9090",
    "TRUNKLINE_METRICS_PORT_9090_TCP_ADDR": "10.0.0.2",
}


def test_service_links_of_kubernetes_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRUNKLINE_MAX_INPUTS", "7")
    assert load_settings({}) == Settings(max_inputs=7)
    assert service_links() == sorted(SERVICE_LINKS)


@pytest.mark.parametrize("name", [*Settings.model_fields, "prot"])
def test_an_empty_variable_means_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TRUNKLINE_{name.upper()}", "")
    assert load_settings({}) == Settings()


def test_an_empty_address_or_key_of_the_client_means_unset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str | None]] = []

    class Noted(Server):
        def __init__(self, url: str, key: str | None) -> None:
            seen.append((url, key))
            raise click.ClickException("noted")

    monkeypatch.setattr("server.cli.client.Server", Noted)
    environment = {"TRUNKLINE_URL": "", "TRUNKLINE_KEY": ""}
    CliRunner().invoke(main, ["adapters", "ls"], env=environment)
    assert seen == [(DEFAULT_URL, None)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20),
        ("2 GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("512Mi", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("512MB", 512_000_000),
        ("1 kB", 1000),
        ("100KB", 100_000),
        ("512M", 512_000_000),
        ("1.5GB", 1_500_000_000),
        ("1TB", 10**12),
        ("65536", 65536),
        ("65536B", 65536),
    ],
)
def test_bytes_have_the_units_that_people_write(text: str, size: int) -> None:
    assert load_settings({"storage_quota": text}).storage_quota == size


@pytest.mark.parametrize("text", ["2XB", "-1GB", "GB", "1,5GB", "1e9", "0x10", "2 G i B"])
def test_other_units_are_refused(text: str) -> None:
    with pytest.raises(BadSettings, match="setting storage_quota: it must be bytes as 2GiB"):
        load_settings({"storage_quota": text})


def test_shares_may_be_patterns_and_a_flag() -> None:
    flags = ["--fair-shares", '{"acme/*": 2, "acme/tone": 3}']
    given: dict[str, object] = {}
    command = click.Command(
        "serve", params=serve.params, callback=lambda **flags: given.update(flags)
    )
    command.main(flags, standalone_mode=False)
    shares = Shares(load_settings({"fair_shares": given["fair_shares"]}).fair_shares)
    assert [shares.of(n) for n in ("acme/tone", "acme/x", "other", "")] == [3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["ACME/tone", "acme tone", "", "a@3", "a" * 300])
def test_a_share_of_an_impossible_name_is_refused(name: str) -> None:
    with pytest.raises(BadSettings, match="setting fair_shares: no adapter can be called "):
        load_settings({"fair_shares": {name: 2.0}})


def test_lists_are_words_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_TRUSTED_PROXIES", "10.0.0.0/8, ::1,unix")
    monkeypatch.setenv("TRUNKLINE_CORS_ORIGINS", "https://Page.example, http://localhost:3000")
    settings = load_settings({})
    assert settings.trusted_proxies == ["10.0.0.0/8", "::1", "unix"]
    assert settings.cors_origins == ["https://page.example", "http://localhost:3000"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trusted_proxies", "10.0.0.0/40"),
        ("trusted_proxies", "proxy.example"),
        ("cors_origins", "page.example"),
        ("cors_origins", "https://page.example/path"),
        ("cors_origins", "https://pagé.example"),
        ("root_path", "llm"),
        ("root_path", "/a//b"),
        ("root_path", "/a b"),
    ],
)
def test_an_impossible_address_is_refused(name: str, value: str) -> None:
    with pytest.raises(BadSettings, match=f"setting {name}: it must be a "):
        load_settings({name: value})


def test_root_path_and_host_are_kept_plain() -> None:
    settings = load_settings({"root_path": "/llm/", "host": "[::1]"})
    assert (settings.root_path, settings.host) == ("/llm", "::1")
