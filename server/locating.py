"""Where in the request's own words an error is: its field, its row, its adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import BadName, TrunklineError
from adapters.names import BASE, parse_reference


@dataclass(frozen=True)
class Place:
    """What a request calls its rows and its adapters."""

    inputs: str = "inputs"
    single: bool = False  # the field is one row, not a list of rows
    first: str | None = None  # the field of row 0, where the list begins with row 1
    adapter: str = "adapter"
    fan_out: bool = False  # the adapters are a list

    def of_row(self, row: int) -> tuple[str, int]:
        """The field of a row of the request, and the row's place in that field."""
        if self.first is not None:
            if row == 0:
                return self.first, 0
            row -= 1
        return (self.inputs if self.single else f"{self.inputs}[{row}]"), row

    def of_adapter(self, index: int) -> str:
        return f"{self.adapter}[{index}]" if self.fan_out else self.adapter


def located(
    error: TrunklineError, place: Place, references: Sequence[str | None], fan_out: int = 1
) -> TrunklineError:
    """The error with its field, row and adapter; `fan_out` rows of the engine are one input.

    It is a new one: an error that a cache keeps is raised for other requests too.
    """
    message, details = error.message, dict(error.details)
    row, adapter = details.get("row"), details.get("adapter")
    if row is not None:
        field, row = place.of_row(row // fan_out)
        details |= {"field": field, "row": row}
        message = f"{field}: {message}"
    elif isinstance(error, BadName):
        details.pop("adapter", None)  # it was never checked
        details["field"] = place.of_adapter(_first_bad(references))
        message = f"{details['field']}: {message}"
    elif adapter is not None:
        details["field"] = _field_of(adapter, place, references)
        if adapter.partition("@")[0] not in message:
            message = f"{adapter}: {message}"
    new = TrunklineError(message, **details)
    new.code = error.code
    return new


def _field_of(adapter: str, place: Place, references: Sequence[str | None]) -> str:
    named = [reference or BASE for reference in references]
    return place.of_adapter(named.index(adapter) if adapter in named else 0)


def _first_bad(references: Sequence[str | None]) -> int:
    """The first reference that cannot name an adapter."""
    for index, reference in enumerate(references):
        try:
            parse_reference(reference if reference not in (None, BASE) else "x")
        except BadName:
            return index
    return 0
