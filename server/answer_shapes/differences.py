"""The answer of /diff."""

from pydantic import BaseModel, Field

from server.answer_shapes.inference import AdapterVersion


class WeightDifference(BaseModel):
    """Frobenius norms at one place of the model that one of the two adapters changes."""

    key: str = Field(description="The place: a parameter of the model.")
    a: float = Field(description="The norm of what the first adapter changes.")
    b: float = Field(description="The norm of what the second adapter changes.")
    difference: float | None = Field(
        description="The norm of the difference of the two changes; null where shapes differ."
    )
    relative: float | None = Field(description="`difference` divided by the larger of the two.")


class DiffAnswer(BaseModel):
    """Where two adapters differ, and how much."""

    a: AdapterVersion
    b: AdapterVersion
    weights: list[WeightDifference]
