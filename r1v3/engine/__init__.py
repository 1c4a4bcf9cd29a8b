"""Engines: one contract, and what runs the model behind it."""
