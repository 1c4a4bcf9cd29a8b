"""Training stages, and their checkpoints, metrics, critical tokens and selection."""
