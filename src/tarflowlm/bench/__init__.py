"""Benchmarks: training, generation, infilling, numerics, data, and the sizes of the large presets."""
