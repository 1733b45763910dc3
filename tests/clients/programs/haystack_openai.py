from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret

server = {
    "api_base_url": "http://127.0.0.1:8000/v1",
    "api_key": Secret.from_token("none"),
    "model": "scripture",
}
query = OpenAITextEmbedder(**server).run("In the beginning")["embedding"]
documents = [Document(content="To be, or not to be")]
(document,) = OpenAIDocumentEmbedder(**server).run(documents)["documents"]
vectors = [query, document.embedding]
