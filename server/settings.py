"""The one settings object: flags, then TRUNKLINE_* in the environment, then a TOML file."""

import difflib
import ipaddress
import json
import math
import os
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

ENV_PREFIX = "TRUNKLINE_"
MAX_SHOWN = 60  # characters of a name or a value, in a sentence about it
# Settings that take 2GiB or 512MiB too.
BYTES = (
    "adapter_memory",
    "host_memory",
    "max_adapter_bytes",
    "storage_quota",
    "max_body_bytes",
    "max_answer_bytes",
    "answer_memory",
)
LISTS = ("trusted_proxies", "cors_origins")  # with commas in the environment and as flags
# What a setting takes, where its type alone doesn't tell.
WANTED = {
    "device": "auto, cpu, cuda or cuda:N",
    "otlp_endpoint": "an address that begins with http:// or https://",
    "fair_shares": "a table of numbers above 0 by adapter name or pattern (in the environment and "
    "as a flag: a JSON object)",
    "root_path": "a path as /llm",
    "trusted_proxies": "a list of addresses, networks as 10.0.0.0/8, or unix",
    "cors_origins": "a list of origins as https://example.com, or *",
    **dict.fromkeys(BYTES, "bytes as 2GiB, 1.5GB, 512MiB or a whole number"),
}
KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    str | None: "a text",
    Path | None: "a path",
}
_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?) ?((?P<unit>[KMGT]?)(?P<binary>i)?B?)", re.IGNORECASE)
_SERVICE_LINK = re.compile(
    r"TRUNKLINE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_NAME_PATTERN = re.compile(r"[a-z0-9._/*?\[\]!-]{1,200}")  # of a name that check_name takes
CLIENT_VARIABLES = {"TRUNKLINE_URL", "TRUNKLINE_KEY"}  # of `trunkline adapters`: no settings


def default_data_dir() -> Path:
    return platformdirs.user_data_path("trunkline")


def _parse_bytes(value: object) -> object:
    """2GiB or 2Gi -> 2147483648, 2GB or 2G -> 2000000000; anything else as it is."""
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    power = " kmgt".index(match["unit"].lower() or " ")
    return int(float(match["number"]) * (1024 if match["binary"] else 1000) ** power)


def service_links() -> list[str]:
    """The variables that Kubernetes sets for a Service of our name: they are no settings."""
    return sorted(name for name, value in os.environ.items() if _is_service_link(name, value))


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name)) or (
        name.startswith(ENV_PREFIX) and bool(re.match("(tcp|udp|sctp)://", value))
    )


def _network(name: str) -> str:
    """Raises ValueError for what is no address, no network, and not `unix`."""
    if name != "unix":
        ipaddress.ip_network(name.strip("[]"), strict=False)
    return name


def _origin(origin: str) -> str:
    """As browsers send it. Raises ValueError."""
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin.lower()):
        raise ValueError("no origin")
    return origin.lower().encode("ascii").decode()


class Settings(BaseModel):
    """Read once, at start. An unknown key, in the file or the environment, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator(*BYTES, mode="before")
    @classmethod
    def _bytes_with_units(cls, value: object) -> object:
        return _parse_bytes(value)

    @field_validator("fair_shares", mode="before")
    @classmethod
    def _json_of_the_environment(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("fair_shares")
    @classmethod
    def _possible_shares(cls, value: dict[str, float]) -> dict[str, float]:
        """A share of 0 would wait for ever; a name that no adapter has would be ignored."""
        for pattern, share in value.items():
            if not _NAME_PATTERN.fullmatch(pattern):
                raise PydanticCustomError("name", "{name}", {"name": _shown(pattern)})
            if not 0 < share < math.inf:
                raise ValueError("a share is not above 0")
        return value

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        """`a, b` of the environment and the command line."""
        if not isinstance(value, str):
            return value
        return [word for word in (part.strip() for part in value.split(",")) if word]

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        return [_network(name) for name in value]

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        return [_origin(origin) for origin in value]

    @field_validator("root_path")
    @classmethod
    def _without_the_last_slash(cls, value: str) -> str:
        return value.rstrip("/")

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        """[::1] as ::1, which is what sockets take."""
        return value[1:-1] if value.startswith("[") and value.endswith("]") else value

    backbone: Path | None = Field(None, description="Backbone folder; default: the demo trunk.")
    adapters: Path | None = Field(
        None, description="Folder of adapter files; default: BACKBONE/adapters where it is there."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    uds: Path | None = Field(
        None, description="Path of a unix socket to listen on, in place of host and port."
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*/?$",
        description="Prefix of the address under which a proxy shows this server, as /llm; the "
        "proxy may pass it on or strip it.",
    )
    trusted_proxies: list[str] = Field(
        default=[],
        description="Addresses and networks of proxies whose X-Forwarded-For, -Proto and -Host are "
        "believed, and `unix` for the unix socket.",
    )
    cors_origins: list[str] = Field(
        default=[],
        description="Origins whose pages may call this server from a browser; * is every origin.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$",
        description="auto, cpu, cuda or cuda:N; auto prefers a GPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="Serving dtype; auto is bfloat16 where the device has it natively. int8 is "
        "bfloat16 with the trunk's matrices in 8 bits.",
    )
    threads: int = Field(0, ge=0, description="CPU threads for the forward; 0 is one a core.")
    data_dir: Path | None = Field(
        None, description="Folder of the registry; default: the platform's user data folder."
    )
    adapter_memory: int = Field(
        1 << 30, ge=1 << 16, description="Bytes of the slots: 2GiB, 512MiB or a number."
    )
    slots: int = Field(0, ge=0, description="Adapters resident at once; 0: as the memory allows.")
    host_memory: int = Field(
        4 << 30, ge=0, description="Bytes of host memory for adapters evicted from a GPU."
    )
    max_rank: int = Field(64, ge=1, description="Largest LoRA rank taken.")
    max_adapter_bytes: int = Field(256 << 20, ge=1, description="Bytes of an adapter file.")
    storage_quota: int = Field(
        0,
        ge=0,
        description="Bytes of all adapter files; 0: no bound. A key that is limited to adapters "
        "stores no more than it leaves free.",
    )
    import_root: Path | None = Field(
        None, description="Folder that /v1/load_lora_adapter may read; default: none."
    )
    fair_shares: dict[str, float] = Field(
        default={},
        description="Share of an adapter in the queue, by its name or a pattern as acme/*; the "
        "first that fits counts, 1 where none does.",
    )
    debug_slots: bool = Field(False, description="Fill freed slots with NaN.")
    max_batch_tokens: int = Field(4096, ge=1, description="Tokens in one batch.")
    max_queue_tokens: int = Field(
        524_288,
        ge=1,
        description="Tokens admitted and not answered yet; one key fills at most half. "
        "Beyond: 503 overloaded.",
    )
    max_queue_s: float = Field(
        2.0,
        gt=0,
        description="Seconds that a row may be expected to wait, at the rate of now; beyond: 503.",
    )
    max_inputs: int = Field(2048, ge=1, description="Rows of one request; beyond: 413.")
    max_request_tokens: int = Field(131_072, ge=1, description="Tokens of one request.")
    max_answer_values: int = Field(
        1 << 24,
        ge=1,
        description="Numbers in one answer; a likely token counts 16. Beyond: 413.",
    )
    max_answer_bytes: int = Field(
        160 << 20,
        ge=1 << 16,
        description="Bytes of one answer and its results, counted before it is computed: 20 a "
        "number in JSON, 8 in binary. Beyond: 413.",
    )
    answer_memory: int = Field(
        512 << 20,
        ge=1 << 16,
        description="Bytes of all answers that are computed, built or not read yet; one key fills "
        "half. Beyond: 503.",
    )
    max_body_bytes: int = Field(8 << 20, ge=1, description="Bytes of a JSON body; beyond: 413.")
    default_timeout_ms: int = Field(
        30_000, ge=1, description="Deadline of a request that names none."
    )
    receive_timeout_s: float = Field(
        30.0, gt=0, description="Seconds a body may take to arrive; beyond: 408."
    )
    openai_token_ids: Literal["accept", "refuse"] = Field(
        "refuse",
        description="Token ids as input of /v1/embeddings; clients send another tokenizer's.",
    )
    drain_window_s: float = Field(
        0.0, ge=0, description="Seconds that a stopping server still accepts connections."
    )
    grace_s: int = Field(
        30, ge=1, description="Seconds a stopping server gives what is in flight, then it ends."
    )
    keys: Path | None = Field(
        None, description="File of API keys; default: keys.json in the data folder."
    )
    insecure: bool = Field(
        False, description="Listen on an address that is not loopback without any keys."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or JSON.")
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://[^/]",
        description="OpenTelemetry collector for a trace a request; needs trunkline[otel].",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Log level."
    )


MAX_FILE_BYTES = 1 << 20


class BadSettings(ValueError):
    """A setting that can't be, with the sentence for it."""


def load_settings(flags: dict[str, Any], file: Path | None = None) -> Settings:
    """Flags over the environment over the file over the defaults. Raises BadSettings.

    An empty variable counts as unset; Kubernetes' service links are passed over.
    """
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): (name, value)
        for name, value in os.environ.items()
        if name.startswith(ENV_PREFIX) and value and name not in CLIENT_VARIABLES
        if not _is_service_link(name, value)
    }
    sources = {key: (str(file), value) for key, value in _read(file).items()} | variables
    sources |= {key: (f"--{key.replace('_', '-')}", value) for key, value in flags.items()}
    try:
        return Settings(**{key: value for key, (_, value) in sources.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        source, value = sources[name]
        fault = _fault(name, value)
        if first["type"] == "name":
            fault = f"no adapter can be called {first['ctx']['name']}, and no pattern is like it"
        raise BadSettings(f"setting {_shown(name)}: {fault} (from {source})") from error


def _read(file: Path | None) -> dict[str, Any]:
    """Raises BadSettings for what is no TOML file."""
    try:
        if file is None:
            return {}
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BadSettings(f"settings file {file}: it has more than {MAX_FILE_BYTES} bytes")
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise BadSettings(f"settings file {file}: {error.strerror}") from error
    except BadSettings:
        raise
    except (ValueError, RecursionError) as error:
        raise BadSettings(f"settings file {file}: {str(error)[:300]}") from error


def _fault(name: str, value: Any) -> str:
    """What is wrong with a setting: its name, else its value."""
    if name in Settings.model_fields:
        value = json.dumps(value, ensure_ascii=False, default=str)
        return f"it must be {wanted(name)}, not {_shown(value)}"
    spelled = name.lower().replace("-", "_")
    near = difflib.get_close_matches(spelled, Settings.model_fields, n=1)
    rest = f"the nearest is {near[0]}" if near else "`trunkline serve --help` lists them all"
    return f"no setting has this name, {rest}"


def wanted(name: str) -> str:
    """What a setting takes, in words: its kind and its bounds."""
    field = Settings.model_fields[name]
    if typing.get_origin(field.annotation) is Literal:
        return f"one of {', '.join(typing.get_args(field.annotation))}"
    bounds = {
        bound: getattr(part, bound)
        for part in field.metadata
        for bound in ("gt", "ge", "le")
        if hasattr(part, bound)
    }
    kind = WANTED.get(name) or KINDS[field.annotation]
    if "le" in bounds:
        return f"{kind} from {bounds['ge']} to {bounds['le']}"
    if "gt" in bounds:
        return f"{kind} above {bounds['gt']}"
    return f"{kind}, {bounds['ge']} or more" if "ge" in bounds else kind


def _shown(text: str) -> str:
    """Text of the user's on one line that is not too long."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}..."
