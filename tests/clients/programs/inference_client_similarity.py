from huggingface_hub import InferenceClient

client = InferenceClient(model="http://127.0.0.1:8000/as/scripture/-")
documents = ["In the beginning", "To be, or not to be", "a cat"]
similar = client.sentence_similarity("the heaven and the earth", other_sentences=documents)
scores = list(enumerate(similar))
