"""What /info says for clients of text-embeddings-inference, beside the server's own fields."""

from typing import Any

from pydantic import BaseModel

from server.answer_shapes.presence import sometimes


class TeiInfo(BaseModel):
    """The fields of text-embeddings-inference's /info."""

    model_id: str = sometimes("The adapter that the path names, else the backbone's id.")
    model_sha: str = sometimes("The digest of that adapter's file, or the backbone's.")
    model_dtype: str = sometimes()
    model_type: dict[str, Any] = sometimes("embedding with its pooling, or classifier with labels.")
    max_concurrent_requests: int | None = sometimes()
    max_input_length: int = sometimes("Tokens of a row: block_size.")
    max_batch_tokens: int = sometimes()
    max_batch_requests: int | None = sometimes()
    max_client_batch_size: int = sometimes("Rows of a request: max_inputs.")
    auto_truncate: bool = sometimes()
    tokenization_workers: int = sometimes()
    docker_label: str | None = sometimes()
    sha: str | None = sometimes()
