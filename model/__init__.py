"""The shared-matrix encoder: trainable reference (GPT), serving forward (Encoder), files."""
