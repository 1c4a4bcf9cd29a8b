"""Evaluation: decoding modes, scores, figures and the report."""
