"""Load tests and benchmarks: they speak HTTP to a server, but for the bench."""
