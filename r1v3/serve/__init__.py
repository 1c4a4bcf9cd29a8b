"""An OpenAI-compatible endpoint over the local engine, with continuous batching."""
