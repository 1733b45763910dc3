from haystack import Document
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

texts = ["In the beginning", "To be, or not to be", "a cat"]
ranker = HuggingFaceTEIRanker(url="http://127.0.0.1:8000")
documents = [Document(content=text) for text in texts]
ranked = ranker.run(query="the heaven and the earth", documents=documents)["documents"]
scores = [(texts.index(document.content), document.score) for document in ranked]
