from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

texts = ["In the beginning", "To be, or not to be", "a cat"]
reranker = TextEmbeddingInference(base_url="http://127.0.0.1:8000/as/scripture/-", top_n=3)
nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
ranked = reranker.postprocess_nodes(nodes, query_str="the heaven and the earth")
scores = [(texts.index(node.text), node.score) for node in ranked]
