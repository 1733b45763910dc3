"""StrictModel: a request body that converts no value and passes no unknown key."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Elsewhere(NamedTuple):
    """A field of another server's schema that this one does not have.

    It is accepted with one of the values of `harmless`, which change no result here (None: with any
    value), and is otherwise refused by its name, for the reason `why`.
    """

    harmless: tuple[Any, ...] | None = ()
    why: str = "it would change the result on other servers and has no meaning here"


IGNORED = Elsewhere(None)


class StrictModel(BaseModel):
    """null stands for an absent field wherever the field is optional (server.bodies.parse)."""

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

    elsewhere: ClassVar[Mapping[str, Elsewhere]] = {}
    nested: ClassVar[str | None] = None  # a key whose object may hold the optional fields

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The document says that optional fields may be null."""
        schema = handler(core_schema)
        resolved = handler.resolve_ref_schema(schema)
        required = resolved.get("required", [])
        for name, field in resolved.get("properties", {}).items():
            if name not in required:
                resolved["properties"][name] = _nullable(field)
        return schema


_BESIDE = ("default", "title", "description")  # what is said of a field, not of its values


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    if isinstance(field.get("type"), str) and "enum" not in field and "const" not in field:
        return field | {"type": [field["type"], "null"]}
    options = field.get("anyOf", [{k: v for k, v in field.items() if k not in _BESIDE}])
    if {"type": "null"} in options:
        return field
    beside = {name: field[name] for name in _BESIDE if name in field}
    return {"anyOf": [*options, {"type": "null"}]} | beside
