"""Run directories: configuration, weights and their checksums; and models by name, shipped or on
the hub.
"""
