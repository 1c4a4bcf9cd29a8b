"""The engine on transformers: one process, one device."""
