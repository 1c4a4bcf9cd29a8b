"""The model: InternVL (InternViT, pixel shuffle, MLP connector, Qwen2)."""
