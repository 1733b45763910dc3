"""An hour of traffic with adapters that come and go, to see whether the server's memory grows."""
