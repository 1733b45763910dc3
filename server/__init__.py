"""The HTTP server: one trunk resident, adapters named by the request."""

__version__ = "0.1.0"
