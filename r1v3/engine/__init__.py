"""Engines: one contract, and the two that train a model behind it."""
