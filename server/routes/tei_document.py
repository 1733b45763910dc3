"""What the OpenAPI document says of an error in text-embeddings-inference's shape."""

from collections import defaultdict

from server.answer_shapes.tei import TeiError
from server.errors import tei_status
from server.routes.documented import GUARD, HEAD, Responses


def tei_errors(*codes: str) -> Responses:
    """FastAPI's `responses` for these codes of the table, with the statuses of these routes."""
    by_status: dict[int, set[str]] = defaultdict(set)
    for code in (*HEAD, *GUARD, *codes):
        by_status[tei_status(code)].add(code)
    content = {"application/json": {"schema": TeiError.model_json_schema()}}
    return {
        status: {
            "description": ", ".join(sorted(names)),
            "content": content,
            "x-codes": sorted(names),
        }
        for status, names in sorted(by_status.items())
    }
