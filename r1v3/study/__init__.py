"""Studies: the report's experiments as files, run, compared by paired intervals, and drawn."""
