"""What a terminal or a log file shows: progress and tables."""
