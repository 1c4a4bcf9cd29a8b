"""Decoding with transformers' InternVL: batched rows with a preallocated cache."""

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from r1v3.data.batch import Batch
from r1v3.model.internvl import embed_prompts, image_features


def prefill(
    model: InternVLForConditionalGeneration,
    cache: object,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    pixel_values: Tensor | None,
) -> Tensor:
    """Run the prompts through the model, filling `cache`; return hidden states [P, L, H]."""
    features = None if pixel_values is None else image_features(model, pixel_values)
    length = prompt_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=prompt_ids.device).tril()
    # Padding attends to itself, so that no row of the softmax is empty.
    mask = causal & prompt_mask[:, None, None, :]
    mask = mask | torch.eye(length, dtype=torch.bool, device=mask.device)
    positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    return model.model.language_model(
        inputs_embeds=embed_prompts(model, prompt_ids, features),
        attention_mask={"full_attention": mask},
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


class DecodeCache:
    """Preallocated keys and values [rows, heads, capacity, head size] of every layer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append new positions to the cached ones; return all of them."""
        if layer == len(self.keys):
            rows, heads, _, size = keys.shape
            self.keys.append(keys.new_zeros(rows, heads, self.capacity, size))
            self.values.append(values.new_zeros(rows, heads, self.capacity, size))
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]


class HFDecoder:
    """A `contract.Decoder` over the live weights of a model."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        self.model = model

    @torch.no_grad()
    def prefill(self, prompts: Batch, group_size: int, capacity: int) -> Tensor:
        """See `contract.Decoder.prefill`."""
        prompts = prompts.to(self.model.device)
        ids, mask = prompts.prompt_ids, prompts.prompt_mask
        self._cache = DecodeCache(ids.shape[1] + capacity)
        hidden = prefill(self.model, self._cache, ids, mask, prompts.pixel_values)[:, -1]
        self._cache.length = ids.shape[1]
        self._steps = 0
        copies = torch.arange(len(ids), device=ids.device).repeat_interleave(group_size)
        self._cache.select(copies)
        self._key_mask = mask[copies]
        return self._logits(hidden[copies])

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """See `contract.Decoder.step`."""
        generated = torch.ones(
            len(token_ids), self._steps + 1, dtype=torch.bool, device=token_ids.device
        )
        mask = torch.cat([self._key_mask, generated], 1)[:, None, None, :]
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(token_ids[:, None]),
            attention_mask={"full_attention": mask},
            position_ids=self._key_mask.sum(1, keepdim=True) + self._steps,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._cache.length += 1
        self._steps += 1
        return self._logits(hidden[:, -1])

    def select(self, rows: Tensor) -> None:
        """See `contract.Decoder.select`."""
        self._cache.select(rows)
        self._key_mask = self._key_mask[rows]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).float()
