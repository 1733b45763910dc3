"""The shapes of the answers, for the OpenAPI document alone: no answer is built of them."""
