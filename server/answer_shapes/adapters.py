"""What the adapter routes answer, for the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Name = Annotated[str, Field(description="The adapter's name.")]
Number = Annotated[int, Field(ge=1, description="A version's number.")]
Digest = Annotated[
    str, Field(pattern="^sha256:[0-9a-f]{64}$", description="SHA-256 of the stored file.")
]
Seconds = Annotated[float, Field(description="Seconds since 1970.")]
InFlight = Annotated[int, Field(ge=0, description="Requests under way that use it.")]


class Pointer(BaseModel):
    """An alias, or `current`, the pointer behind the bare name."""

    version: Number
    previous: Number | None = Field(description="What it pointed to before: for a rollback.")
    generation: int = Field(description="Grows with every move; the ETag of the alias.")


class AdapterRow(BaseModel):
    """One adapter in the list; digest, rank, bytes and created_at are the current version's."""

    name: Name
    version: Number | None = Field(description="The current version; null: none is current.")
    aliases: dict[str, Pointer]
    versions: list[Number]
    digest: Digest
    rank: int
    bytes: int
    created_at: Seconds
    resident: bool = Field(description="Whether the current version is in the slots.")
    in_flight: InFlight
    requests: int = Field(description="Requests since the server started.")
    last_used: Seconds | None


class UnusableFile(BaseModel):
    """A file of the adapter folder that could not be published when the server started."""

    file: str
    name: Name
    reason: str
    message: str


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[AdapterRow]
    unusable: list[UnusableFile]
    next: str | None = Field(description="`after` of the next page; null on the last one.")


class Applied(BaseModel):
    """What a version changes, and where."""

    lora: dict[str, dict[str, int]] = Field(description="Rank by layer and site.")
    norms: list[str] = Field(description="LayerNorms that are replaced.")
    critic: bool
    calibration: bool
    classifier: bool
    sequence_head: bool
    cls_embedding: bool


class VersionFacts(BaseModel):
    """A version; nothing of it ever changes."""

    version: Number
    digest: Digest
    bytes: int
    created_at: Seconds
    rank: int = Field(description="The largest rank of any site; 0 without LoRA.")
    probe_delta: float = Field(
        description="How far the probe forward pass moved, relative to the backbone's states."
    )
    applied: Applied
    labels: list[str]
    metadata: dict[str, str] = Field(description="The file's own metadata.")
    damaged: bool


class Converted(BaseModel):
    """What was made of a PEFT folder."""

    source: Literal["peft"] = Field(alias="from")
    lora: int = Field(description="Linears with LoRA that were kept.")
    saved: list[str] = Field(description="Modules of modules_to_save that were kept.")
    lora_alpha: float
    folded: int = Field(description="Linears whose own alpha was folded into their B.")
    dropped: list[str] = Field(description="Fields of adapter_config.json without a meaning here.")
    ignored_files: int = Field(description="Other files of the folder, which were not read.")


class Uploaded(VersionFacts):
    """The version that has the uploaded bytes."""

    name: Name
    converted: Converted | None = Field(None, description="Only for a PEFT folder.")


class Place(BaseModel):
    resident: bool = Field(description="Whether it was brought into the slots by its own name.")
    pinned: bool = Field(description="Whether it was pinned, as this version of this name.")
    pin_held: bool = Field(
        description="Whether it is exempt from eviction: false for a pin that the pool, smaller "
        "since a restart, has no room for."
    )
    in_flight: InFlight


class VersionRow(VersionFacts, Place):
    """A version, and where it is now."""


class NamedVersion(VersionRow):
    name: Name


class AuditEntry(BaseModel):
    at: Seconds
    who: str
    action: str
    detail: dict[str, Any]


class Adapter(AdapterRow):
    """One adapter with a page of its versions: all of them, unless they are very many or large."""

    versions: list[VersionRow]  # type: ignore[assignment]
    versions_next: Number | None = Field(
        description="`versions_after` of the next page; null on the last one."
    )
    audit: list[AuditEntry] = Field(description="Who did what, the latest first; at most 100.")


class MovedAlias(Pointer):
    name: Name
    alias: str


class Residency(Place):
    name: Name
    version: Number
    digest: Digest


class Removed(BaseModel):
    name: Name
    version: Number | None = Field(description="null: all versions of the name.")
    in_flight: InFlight


class Verified(BaseModel):
    name: Name
    sound: bool
    versions: dict[str, str | None] = Field(description="What is wrong, by version; null: nothing.")


class LoadedLora(BaseModel):
    """vLLM's route, in JSON."""

    status: Literal["success"]
    name: Name
    version: Number
    digest: Digest
    converted: Converted | None = Field(None, description="Only for a PEFT folder.")


class UnloadedLora(BaseModel):
    status: Literal["success"]
    in_flight: InFlight
