from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

embed = HuggingFaceEmbeddingServer(url="http://127.0.0.1:8000/as/scripture/-/embed")
vectors = embed(["In the beginning", "To be, or not to be"])
