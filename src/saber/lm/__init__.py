"""Load a language model, run it, and find what writes to its residual stream."""
