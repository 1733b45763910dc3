from huggingface_hub import InferenceClient

client = InferenceClient(model="http://127.0.0.1:8000/as/supersense/-/predict")
labels = [(found.label, found.score) for found in client.text_classification("a cat", top_k=3)]
print(labels[0])
