from tei_client import HttpClient

client = HttpClient("http://127.0.0.1:8000/as/scripture/-")
vectors = client.embed(["In the beginning", "To be, or not to be"])
