"""The shapes of answers, for the OpenAPI document alone: no answer is made or checked by them."""
