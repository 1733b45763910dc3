"""Adapter sets: their file format, validation, names and versions, and their place in memory."""
