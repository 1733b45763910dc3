from llama_index.embeddings.openai_like import OpenAILikeEmbedding

embeddings = OpenAILikeEmbedding(
    api_base="http://127.0.0.1:8000/v1", api_key="none", model_name="scripture"
)
texts = ["In the beginning", "To be, or not to be"]
vectors = embeddings.get_text_embedding_batch(texts)
