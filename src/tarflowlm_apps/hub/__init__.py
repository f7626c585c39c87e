"""The Hugging Face hub: a saved model with its card, uploaded (docs/hub.md)."""
