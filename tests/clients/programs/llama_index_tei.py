from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

embeddings = TextEmbeddingsInference(
    model_name="scripture", base_url="http://127.0.0.1:8000/as/scripture/-"
)
texts = ["In the beginning", "To be, or not to be"]
vectors = embeddings.get_text_embedding_batch(texts)
