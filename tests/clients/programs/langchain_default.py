from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings(
    base_url="http://127.0.0.1:8000/v1", api_key="none", model="scripture"
)
vectors = embeddings.embed_documents(["In the beginning", "To be, or not to be"])
