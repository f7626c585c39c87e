"""Models for `transformers`."""
