"""Evaluation: decoding modes, grading, scores with their intervals."""
