from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

embed = OpenAIEmbeddingFunction(
    api_base="http://127.0.0.1:8000/v1", api_key="none", model_name="scripture"
)
vectors = embed(["In the beginning", "To be, or not to be"])
