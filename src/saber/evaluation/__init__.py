"""The pieces that measure a model."""
