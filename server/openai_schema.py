"""The body of POST /v1/embeddings, and what of other servers' schemas it takes or refuses."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from server.number_formats import DType
from server.schemas import Inputs, Reference
from server.strict_model import IGNORED, Elsewhere, StrictModel

_NO_PROMPTS = "the trunk has no prompts or instructions, so it would change nothing: leave it out"
_NO_CHAT = "the trunk has no chat template: send the text as input"
_TEXT_ONLY = "the trunk takes text alone"

# Of OpenAI, vLLM and others whose clients send the same body elsewhere.
NO_EFFECT = {
    "user": IGNORED,
    "priority": IGNORED,
    "request_id": IGNORED,
    "cache_salt": IGNORED,
    "metadata": IGNORED,
    "store": IGNORED,
    "service_tier": IGNORED,
    "safety_identifier": IGNORED,
    "padding": Elsewhere(("do_not_pad",), "rows are never padded"),
    "mm_processor_kwargs": Elsewhere(({},), _TEXT_ONLY),
    "media_io_kwargs": Elsewhere(({},), _TEXT_ONLY),
    "chat_template": Elsewhere((), _NO_CHAT),
    "chat_template_kwargs": Elsewhere(({},), _NO_CHAT),
    "prompt_name": Elsewhere((), _NO_PROMPTS),
    "prompt": Elsewhere((), _NO_PROMPTS),
    "instruction": Elsewhere((), _NO_PROMPTS),
}

TruncateTokens = Annotated[
    int,
    Field(ge=-1, description="Cut each row to this many tokens; -1: to the trunk's block_size."),
]


class EmbeddingsRequest(StrictModel):
    """OpenAI's body, with vLLM's options."""

    elsewhere: ClassVar = NO_EFFECT | {
        "endianness": Elsewhere(("native", "little"), "bytes are little-endian"),
        "use_activation": Elsewhere((True,), "POST /encode takes normalize"),
        "messages": Elsewhere((), _NO_CHAT),
        "add_generation_prompt": Elsewhere((False,), _NO_CHAT),
        "continue_final_message": Elsewhere((False,), _NO_CHAT),
        "pooling": Elsewhere((), "POST /encode takes pooling"),
        "layer": Elsewhere((), "POST /encode takes layer"),
        "input_type": Elsewhere((), _NO_PROMPTS),
        "task": Elsewhere(("embed",), _NO_PROMPTS),
        "late_chunking": Elsewhere((False,), "each row is encoded by itself"),
        "normalized": Elsewhere((True,), "use normalize"),
        "embedding_type": Elsewhere(("float",), "use encoding_format and embed_dtype"),
        "output_dtype": Elsewhere(("float",), "use encoding_format and embed_dtype"),
        "output_dimension": Elsewhere((), "use dimensions"),
        "truncation": Elsewhere((), "use truncate"),
    }

    model: Reference | None = Field(
        None, description="Adapter reference, the backbone's id, or base; required without /as/."
    )
    input: Inputs
    encoding_format: Literal["float", "base64", "bytes_only"] = Field(
        "float", description="bytes_only answers the packed rows alone."
    )
    embed_dtype: DType = "float32"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    normalize: bool = True
    truncate: bool = False
    truncate_prompt_tokens: TruncateTokens | None = None
    truncation_side: Literal["left", "right"] = "right"
    add_special_tokens: bool = True
