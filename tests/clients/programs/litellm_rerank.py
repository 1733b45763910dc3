import litellm

answer = litellm.rerank(
    model="cohere/scripture",
    query="the heaven and the earth",
    documents=["In the beginning", "To be, or not to be", "a cat"],
    api_base="http://127.0.0.1:8000",
    api_key="none",
)
scores = [(result["index"], result["relevance_score"]) for result in answer.results]
