"""The clients of docs/clients.md: each a program of programs/, its environment, its exception."""

from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Client:
    """One program, run with one version of a package."""

    name: str  # in the table
    package: str  # whose version the table names
    environment: str
    program: str
    unknown: str | None  # the exception for an adapter that is not there; None: it ignores a status
    kind: str = "python"
    at_root_only: bool = False  # it drops the path of its base URL
    prelude: str = ""  # code that runs before the program

    @property
    def id(self) -> str:
        return f"{self.program}-{self.environment}"

    @property
    def process(self) -> tuple[str, str, str]:
        """What programs that run in one process have in common."""
        return self.kind, self.environment, self.prelude

    @property
    def code(self) -> str:
        return (PROGRAMS / self.program).read_text("utf-8")

    @property
    def names_adapter(self) -> bool:
        return "scripture" in self.code or "supersense" in self.code

    @property
    def names_adapter_in_url(self) -> bool:
        return "/as/" in self.code

    @property
    def has_base_url_case(self) -> bool:
        """Whether the adapter can stand in the base URL and another name be the model."""
        return self.names_adapter and not self.names_adapter_in_url and not self.at_root_only


OPENAI = "openai.NotFoundError"
HUB = "huggingface_hub.HfHubHTTPError"

EMBEDDINGS = (
    Client("openai (Python)", "openai", "openai", "openai_sdk.py", OPENAI),
    Client("openai (Python)", "openai", "openai-2", "openai_sdk.py", OPENAI),
    Client("openai (Python)", "openai", "openai-1", "openai_sdk.py", OPENAI),
    Client("openai (Node)", "openai", "openai-node", "openai_sdk.mjs", "NotFoundError", "node"),
    Client(
        "LangChain `OpenAIEmbeddings`",
        "langchain-openai",
        "langchain",
        "langchain_openai_embeddings.py",
        OPENAI,
    ),
    Client(
        "LangChain `OpenAIEmbeddings`",
        "langchain-openai",
        "langchain-old",
        "langchain_openai_embeddings.py",
        OPENAI,
    ),
    Client(
        "LangChain `HuggingFaceEndpointEmbeddings`",
        "langchain-huggingface",
        "langchain",
        "langchain_endpoint_embeddings.py",
        HUB,
    ),
    Client(
        "LangChain `HuggingFaceEndpointEmbeddings`",
        "langchain-huggingface",
        "langchain-old",
        "langchain_endpoint_embeddings_old.py",
        HUB,
    ),
    Client(
        "LlamaIndex `OpenAILikeEmbedding`",
        "llama-index-embeddings-openai-like",
        "llama-index",
        "llama_index_openai_like.py",
        OPENAI,
    ),
    Client(
        "LlamaIndex `OpenAIEmbedding`",
        "llama-index-embeddings-openai",
        "llama-index",
        "llama_index_openai.py",
        OPENAI,
    ),
    Client(
        "LlamaIndex `TextEmbeddingsInference`",
        "llama-index-embeddings-text-embeddings-inference",
        "llama-index",
        "llama_index_tei.py",
        None,
    ),
    Client(
        "Haystack `OpenAITextEmbedder`, `OpenAIDocumentEmbedder`",
        "haystack-ai",
        "haystack",
        "haystack_openai.py",
        OPENAI,
    ),
    Client(
        "Haystack `HuggingFaceAPITextEmbedder`, `…DocumentEmbedder`",
        "huggingface-api-haystack",
        "haystack",
        "haystack_tei.py",
        HUB,
    ),
    Client("LiteLLM", "litellm", "litellm", "litellm_openai.py", "litellm.NotFoundError"),
    Client("LiteLLM", "litellm", "litellm-old", "litellm_openai.py", "litellm.BadRequestError"),
    Client("Chroma `OpenAIEmbeddingFunction`", "chromadb", "chroma", "chroma_openai.py", OPENAI),
    Client("Chroma `HuggingFaceEmbeddingServer`", "chromadb", "chroma", "chroma_tei.py", None),
    Client(
        "huggingface_hub `InferenceClient`",
        "huggingface_hub",
        "huggingface-hub",
        "inference_client.py",
        HUB,
    ),
    Client(
        "huggingface_hub `InferenceClient`",
        "huggingface_hub",
        "huggingface-hub-old",
        "inference_client.py",
        HUB,
    ),
    Client("tei-client", "tei-client", "tei", "tei_client_package.py", None),
    Client(
        "text-embeddings-inference-client",
        "text-embeddings-inference-client",
        "tei",
        "tei_generated_client.py",
        "text_embeddings_inference_client.UnexpectedStatus",
    ),
)

COHERE = "cohere.NotFoundError"
LITELLM = "litellm.NotFoundError"

RERANKERS = (
    Client("cohere `ClientV2.rerank`", "cohere", "cohere", "cohere_v2.py", COHERE),
    Client("cohere `ClientV2.rerank`", "cohere", "cohere-5", "cohere_v2.py", COHERE),
    Client("cohere `Client.rerank`", "cohere", "cohere", "cohere_v1.py", COHERE),
    Client("cohere `Client.rerank`", "cohere", "cohere-5", "cohere_v1.py", COHERE),
    Client("LiteLLM `rerank`, cohere", "litellm", "litellm", "litellm_rerank.py", LITELLM),
    Client(
        "LiteLLM `rerank`, cohere",
        "litellm",
        "litellm-old",
        "litellm_rerank.py",
        "litellm.APIConnectionError",
    ),
    Client(
        "LiteLLM `rerank`, jina_ai",
        "litellm",
        "litellm",
        "litellm_rerank_jina.py",
        LITELLM,
        at_root_only=True,
    ),
    Client(
        "LiteLLM `rerank`, hosted_vllm", "litellm", "litellm", "litellm_rerank_vllm.py", LITELLM
    ),
    Client(
        "LiteLLM `rerank`, huggingface",
        "litellm",
        "litellm",
        "litellm_rerank_tei.py",
        "litellm.APIError",
    ),
    Client("Haystack `CohereRanker`", "cohere-haystack", "haystack", "haystack_cohere.py", COHERE),
    Client(
        "Haystack `HuggingFaceTEIRanker`",
        "huggingface-api-haystack",
        "haystack",
        "haystack_tei_ranker.py",
        None,
        at_root_only=True,
    ),
    Client(
        "LlamaIndex `TextEmbeddingInference` (rerank)",
        "llama-index-postprocessor-tei-rerank",
        "llama-index",
        "llama_index_tei_rerank.py",
        None,
    ),
    Client(
        "huggingface_hub `sentence_similarity`",
        "huggingface_hub",
        "huggingface-hub",
        "inference_client_similarity.py",
        HUB,
    ),
    Client(
        "huggingface_hub `sentence_similarity`",
        "huggingface_hub",
        "huggingface-hub-old",
        "inference_client_similarity.py",
        HUB,
    ),
)

# OpenAIEmbeddings of LangChain sends the ids of the tokenizer cl100k_base, which it downloads. This
# replaces it by one of single bytes: the ids are others, what is sent has the same form.
BYTES_FOR_CL100K = """
import tiktoken
import tiktoken.registry

ranks = {bytes([byte]): byte for byte in range(256)}
tiktoken.registry.ENCODINGS["cl100k_base"] = tiktoken.Encoding(
    "cl100k_base", pat_str=r"\\w+|\\W", mergeable_ranks=ranks, special_tokens={}
)
"""
LANGCHAIN_DEFAULTS = tuple(
    Client(
        "LangChain `OpenAIEmbeddings`, default settings",
        "langchain-openai",
        environment,
        "langchain_default.py",
        OPENAI,
        prelude=BYTES_FOR_CL100K,
    )
    for environment in ("langchain", "langchain-old")
)
LABELS = tuple(
    Client(
        "huggingface_hub `text_classification`",
        "huggingface_hub",
        environment,
        "inference_client_labels.py",
        HUB,
    )
    for environment in ("huggingface-hub", "huggingface-hub-old")
)
ALL = EMBEDDINGS + RERANKERS + LANGCHAIN_DEFAULTS + LABELS
