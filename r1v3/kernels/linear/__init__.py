"""The language head and its losses, a part of the logits at a time."""
