"""Likelihood, the share of each block, sample quality, and counts of operations."""
