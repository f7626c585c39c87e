"""Fast paths of a CPU: linear space where it is exact, `reference` where it is not. No autograd; branches on data."""
