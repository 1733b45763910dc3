from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker

texts = ["In the beginning", "To be, or not to be", "a cat"]
ranker = CohereRanker(
    api_base_url="http://127.0.0.1:8000", api_key=Secret.from_token("none"), model="scripture"
)
documents = [Document(content=text) for text in texts]
ranked = ranker.run(query="the heaven and the earth", documents=documents)["documents"]
scores = [(texts.index(document.content), document.score) for document in ranked]
