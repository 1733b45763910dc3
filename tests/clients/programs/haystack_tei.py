from haystack import Document
from haystack_integrations.components.embedders.huggingface_api import (
    HuggingFaceAPIDocumentEmbedder,
    HuggingFaceAPITextEmbedder,
)

server = {
    "api_type": "text_embeddings_inference",
    "api_params": {"url": "http://127.0.0.1:8000/as/scripture/-"},
    "normalize": True,  # Haystack's own default is False
}
query = HuggingFaceAPITextEmbedder(**server).run("In the beginning")["embedding"]
documents = [Document(content="To be, or not to be")]
(document,) = HuggingFaceAPIDocumentEmbedder(**server).run(documents)["documents"]
vectors = [query, document.embedding]
