import litellm

answer = litellm.embedding(
    model="openai/scripture",
    input=["In the beginning", "To be, or not to be"],
    api_base="http://127.0.0.1:8000/v1",
    api_key="none",
)
vectors = [row["embedding"] for row in answer.data]
