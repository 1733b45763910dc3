"""Answers of /health, /ready, /info and /debug/engine."""

from typing import Literal

from pydantic import BaseModel, Field

from adapters.slots import PoolStats
from model.config import GPTConfig
from server.answer_shapes.presence import sometimes
from server.answer_shapes.tei import TeiInfo


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class UnservedFile(BaseModel):
    """A file of the adapter folder that is not served."""

    file: str
    reason: str


class StorageFault(BaseModel):
    """Why uploads are refused now."""

    code: Literal["read_only", "storage_full"] = Field(description="The code that uploads get.")
    message: str


class Storage(BaseModel):
    """Whether the data folder takes writes; it is looked at every five seconds."""

    uploads: bool = Field(description="Whether uploads are taken.")
    fault: StorageFault | None
    reserve_bytes: int = Field(description="Kept back for deletes on a full disk; 0: given up.")


class ReadinessDetails(BaseModel):
    storage: StorageFault = sometimes("Only while the data folder takes no uploads.")
    unusable_files: int = sometimes("How many files of the adapter folder are not served.")
    unusable: list[UnservedFile] = sometimes("Those files; only on a server without keys.")


class Readiness(BaseModel):
    """The server takes traffic."""

    status: Literal["ready"]
    details: ReadinessDetails = sometimes("Only where something is not served or not taken.")


class BackboneHeads(BaseModel):
    """Which heads the backbone carries."""

    critic: bool
    sequence: bool
    calibration: bool


class BackboneInfo(BaseModel):
    """The trunk that is served."""

    id: str
    digest: str
    heads: BackboneHeads


class Limits(BaseModel):
    """What requests are held to."""

    max_batch_tokens: int
    max_queue_tokens: int
    max_inputs: int = Field(description="Rows of a request: inputs times adapters.")
    max_request_tokens: int
    max_answer_values: int = Field(description="Numbers in an answer.")
    max_answer_bytes: int = Field(description="Bytes of an answer and its results.")
    max_body_bytes: int
    default_timeout_ms: int
    block_size: int = Field(description="Tokens of a row.")


class Info(TeiInfo):
    """What is served, and how."""

    version: str = Field(description="The server's version.")
    backbone: BackboneInfo
    config: GPTConfig
    dtype: str
    device: str
    operators: str = Field(description="compiled or torch: what runs between matrix products.")
    adapters: int = Field(description="How many are registered, of those that the key may see.")
    slots: PoolStats = sometimes("Left out for a key that is limited to some adapters.")
    leases: int = Field(description="Adapter versions that requests hold now, of the same ones.")
    storage: Storage
    limits: Limits


class EngineState(BaseModel):
    """The engine at this moment."""

    ready: bool
    batch_s: float | None = Field(description="Seconds since the running batch began, if one runs.")
    waiting_rows: int
    tokens_admitted: int
    slots: PoolStats
    leases: int
