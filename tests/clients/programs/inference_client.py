from huggingface_hub import InferenceClient

client = InferenceClient(model="http://127.0.0.1:8000/as/scripture/-")
vectors = client.feature_extraction(["In the beginning", "To be, or not to be"])
print(vectors.shape)
