import cohere

client = cohere.ClientV2(base_url="http://127.0.0.1:8000", api_key="none")
documents = ["In the beginning", "To be, or not to be", "a cat"]
answer = client.rerank(model="scripture", query="the heaven and the earth", documents=documents)
scores = [(result.index, result.relevance_score) for result in answer.results]
