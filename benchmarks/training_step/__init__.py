"""A whole GRPO step: fused head, materialised logits, TRL."""
