"""A whole GRPO step: fused head, materialized logits, TRL."""
