"""What stays of a training: its configuration, its directory of files, presets, and the shipped models."""
