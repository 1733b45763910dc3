from langchain_huggingface import HuggingFaceEndpointEmbeddings

embeddings = HuggingFaceEndpointEmbeddings(model="http://127.0.0.1:8000/as/scripture/-")
vectors = embeddings.embed_documents(["In the beginning", "To be, or not to be"])
