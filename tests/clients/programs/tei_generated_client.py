from text_embeddings_inference_client import Client
from text_embeddings_inference_client.api.text_embeddings_inference import embed
from text_embeddings_inference_client.models import EmbedRequest

client = Client(base_url="http://127.0.0.1:8000/as/scripture/-", raise_on_unexpected_status=True)
request = EmbedRequest(inputs=["In the beginning", "To be, or not to be"])
vectors = embed.sync(client=client, json_body=request)
