"""The engine: admission, queue, batches, and the one thread that owns the device."""
