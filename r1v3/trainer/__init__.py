"""Training stages and what they share: checkpoints, metrics, critical tokens, selection."""
