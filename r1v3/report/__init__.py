"""The HTML report of a run: figures, tables, findings, transcripts."""
