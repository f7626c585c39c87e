"""Models in EleutherAI's lm-evaluation-harness (docs/harness.md)."""
