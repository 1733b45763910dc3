"""The adapter sets shipped for a first try."""
