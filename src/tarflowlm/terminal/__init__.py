"""Progress, tables and texts on a terminal or in a log file."""
