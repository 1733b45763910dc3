"""The trunk shipped for a first try."""
