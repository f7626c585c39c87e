"""Models as causal language models of `transformers`."""
