from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
texts = ["In the beginning", "To be, or not to be"]
answer = client.embeddings.create(model="scripture", input=texts)
vectors = [row.embedding for row in answer.data]
print(len(vectors), "vectors of", len(vectors[0]))
