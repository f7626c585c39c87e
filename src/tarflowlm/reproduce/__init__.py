"""The paper's tables and figures: trainings, measurements and written results, one recipe a file."""
