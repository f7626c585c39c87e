"""Run directories: configuration, weights, checksums; and models by name."""
