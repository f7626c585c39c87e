"""What a terminal or a log file shows: progress, tables and texts."""
