"""The one settings object: flags, then TRUNKLINE_* in the environment, then a TOML file."""

import difflib
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

ENV_PREFIX = "TRUNKLINE_"
MAX_SHOWN = 60  # characters of a name or a value, in a sentence about it
# Settings that take 2GiB or 512MiB too.
BYTES = ("adapter_memory", "host_memory", "max_adapter_bytes", "storage_quota", "max_body_bytes")
# What a setting takes, where its type alone doesn't tell.
WANTED = {
    "device": "auto, cpu, cuda or cuda:N",
    "otlp_endpoint": "an address that begins with http:// or https://",
    "fair_shares": "a table of numbers above 0 by adapter name (in the environment: a JSON object)",
    **dict.fromkeys(BYTES, "bytes as 2GiB, 512MiB or a whole number"),
}
KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    str | None: "a text",
    Path | None: "a path",
}
CLIENT_VARIABLES = {"TRUNKLINE_URL", "TRUNKLINE_KEY"}  # of `trunkline adapters`: no settings


def default_data_dir() -> Path:
    return platformdirs.user_data_path("trunkline")


def _parse_bytes(value: object) -> object:
    """2GiB -> 2147483648; anything else as it is."""
    match = re.fullmatch(r"(\d+) ?([KMGT])iB", value) if isinstance(value, str) else None
    return int(match[1]) << (10 * ("KMGT".index(match[2]) + 1)) if match else value


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
    def _shares_above_0(cls, value: dict[str, float]) -> dict[str, float]:
        """One of 0 would wait for ever."""
        if not all(0 < share < math.inf for share in value.values()):
            raise ValueError("a share is not above 0")
        return value

    backbone: Path | None = Field(None, description="Backbone folder; default: the demo trunk.")
    adapters: Path | None = Field(
        None, description="Folder of adapter files; default: BACKBONE/adapters where it is there."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
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
    storage_quota: int = Field(0, ge=0, description="Bytes of all adapter files; 0: no bound.")
    import_root: Path | None = Field(
        None, description="Folder that /v1/load_lora_adapter may read; default: none."
    )
    fair_shares: dict[str, float] = Field(
        default={}, description="Share of an adapter in the queue by its name; 1 where not named."
    )
    debug_slots: bool = Field(False, description="Fill freed slots with NaN.")
    max_batch_tokens: int = Field(4096, ge=1, description="Tokens in one batch.")
    max_queue_tokens: int = Field(
        524_288,
        ge=1,
        description="Tokens admitted and not answered yet; one key and adapter fills half. "
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


class BadSettings(ValueError):
    """A setting that can't be, with the sentence for it."""


def load_settings(flags: dict[str, Any], file: Path | None = None) -> Settings:
    """Flags over the environment over the file over the defaults. Raises BadSettings."""
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): (name, value)
        for name, value in os.environ.items()
        if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES
    }
    sources = {key: (str(file), value) for key, value in _read(file).items()} | variables
    sources |= {key: (f"--{key.replace('_', '-')}", value) for key, value in flags.items()}
    try:
        return Settings(**{key: value for key, (_, value) in sources.items()})
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        source, value = sources[name]
        raise BadSettings(
            f"setting {_shown(name)}: {_fault(name, value)} (from {source})"
        ) from error


def _read(file: Path | None) -> dict[str, Any]:
    """Raises BadSettings for what is no TOML file."""
    try:
        return tomllib.loads(file.read_text("utf-8")) if file else {}
    except OSError as error:
        raise BadSettings(f"settings file {file}: {error.strerror}") from error
    except ValueError as error:
        raise BadSettings(f"settings file {file}: {error}") from error


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
