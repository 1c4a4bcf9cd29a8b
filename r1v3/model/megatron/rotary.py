"""Rotary angles of packed positions."""

import torch
from torch import Tensor
from transformers import PretrainedConfig


class Rotary:
    """Angles for megatron-core's half-rotation RoPE.

    Args:
        config: of the language model. "dynamic" scaling changes nothing up to
            max_position_embeddings, which is as far as it is supported.

    Raises:
        ValueError: another kind of scaling is configured.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        parameters = config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "dynamic"):
            raise ValueError(f"rope_type {kind!r} is not supported; use default or dynamic")
        self.theta = float(parameters["rope_theta"])
        self.size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.limit = config.max_position_embeddings if kind == "dynamic" else None

    def __call__(self, position_ids: Tensor, longest: int) -> Tensor:
        """float32 [T, 1, 1, head size] for position_ids [T], the largest of which is longest - 1.

        Raises:
            ValueError: a sequence is longer than dynamic scaling leaves alone.
        """
        if self.limit is not None and longest > self.limit:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_position_embeddings "
                f"({self.limit}), beyond which dynamic RoPE scaling is not implemented"
            )
        device = position_ids.device
        exponents = torch.arange(0, self.size, 2, dtype=torch.float32, device=device) / self.size
        angles = position_ids.float().unsqueeze(1) / self.theta**exponents
        return torch.cat([angles, angles], 1)[:, None, None, :]
