"""Likelihood, the share of each block, and counts of operations."""
