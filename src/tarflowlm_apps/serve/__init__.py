"""Models behind the completions of the OpenAI interface (docs/serve.md)."""
