"""Error answers: the shape of every route, and OpenAI's, which the routes under /v1 have."""

from typing import Any

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str = Field(
        description="Names the fault; a program may rely on it.", examples=["empty_input"]
    )
    message: str = Field(description="A sentence for people. Never contains what the client sent.")
    details: dict[str, Any] = Field(
        description="Numbers and names that belong to the fault: row, limit, field, adapter."
    )
    request_id: str | None = Field(description="The same as in the x-request-id header.")


class Error(BaseModel):
    """An error answer, of every route that is not under /v1."""

    error: ErrorBody


class OpenAIErrorBody(BaseModel):
    """What went wrong, in OpenAI's fields."""

    message: str = Field(description="A sentence for people. Never contains what the client sent.")
    type: str = Field(description="invalid_request_error, or server_error from status 500.")
    param: str | None = Field(description="The field of the request that is at fault, if known.")
    code: str = Field(description="Names the fault, as in the other routes' error answers.")


class OpenAIError(BaseModel):
    """An error answer in OpenAI's shape."""

    error: OpenAIErrorBody
