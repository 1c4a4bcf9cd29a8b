"""Decoding rows that join and leave between steps."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from r1v3.data.batch import Batch
from r1v3.engine.hf.decoder import prefill

_FIRST_CAPACITY = 256


class RowCache:
    """Keys and values [rows, capacity, heads, head size] of every layer; a row's first token is at
    position 0, so that what it reads does not depend on the other rows.

    Attributes:
        prompts: rows and lengths of prompts, padded on the left, that are being written; None in
            a decoding step.
        slots: int64 [R], where the tokens of a step go, row * capacity + position.
        width: positions that a step reads.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.capacity = _FIRST_CAPACITY
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prompts: list[tuple[int, int]] | None = None
        self.slots = torch.zeros(0, dtype=torch.int64)
        self.width = 0

    def reserve(self, length: int) -> None:
        """Make room for rows of so many tokens."""
        while self.capacity < length:
            more = self.capacity
            self.keys = [nn.functional.pad(k, (0, 0, 0, 0, 0, more)) for k in self.keys]
            self.values = [nn.functional.pad(v, (0, 0, 0, 0, 0, more)) for v in self.values]
            self.capacity += more

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write the new positions; return all keys and values that the rows may read."""
        if layer == len(self.keys):
            _, heads, _, size = keys.shape
            self.keys.append(keys.new_zeros(self.rows, self.capacity, heads, size))
            self.values.append(values.new_zeros(self.rows, self.capacity, heads, size))
        return self._write(self.keys[layer], keys), self._write(self.values[layer], values)

    def _write(self, own: Tensor, new: Tensor) -> Tensor:
        """Write [rows, heads, new positions, head size]; return it with what is before it."""
        if self.prompts is not None:
            for prompt, (row, length) in zip(new, self.prompts, strict=True):
                own[row, :length] = prompt[:, prompt.shape[1] - length :].transpose(0, 1)
            return new
        own.view(-1, *own.shape[2:]).index_copy_(0, self.slots, new[:, :, 0])
        return own[: len(self.slots), : self.width].transpose(1, 2)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row to another one."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :length] = tensor[source, :length]


class RowDecoder:
    """Rows 0 to R - 1 over the live weights of a model; logits are float32 [rows, V].

    Args:
        max_rows: most rows at a time.
    """

    def __init__(self, model: InternVLForConditionalGeneration, max_rows: int) -> None:
        self.model = model
        self.lengths: list[int] = []
        self._cache = RowCache(max_rows)

    @torch.inference_mode()
    def join(self, prompts: Batch, copies: Sequence[int]) -> Tensor:
        """Add so many rows of each prompt after the others; return their logits.

        Raises:
            ValueError: there are not as many rows left.
        """
        if len(self.lengths) + sum(copies) > self._cache.rows:
            raise ValueError(f"{len(self.lengths)} of {self._cache.rows} rows are taken")
        prompts = prompts.to(self.model.device)
        ids, mask = prompts.prompt_ids, prompts.prompt_mask
        ends = list(accumulate(copies, initial=len(self.lengths)))
        placed = list(zip(ends[:-1], mask.sum(1).tolist(), strict=True))
        self._cache.reserve(ids.shape[1])
        self._cache.prompts = placed
        hidden = prefill(self.model, self._cache, ids, mask, prompts.pixel_values)[:, -1]
        for (first, length), end in zip(placed, ends[1:], strict=True):
            for row in range(first + 1, end):
                self._cache.copy_row(first, row, length)
            self.lengths += [length] * (end - first)
        repeats = torch.tensor(list(copies), device=ids.device)
        return self._logits(hidden).repeat_interleave(repeats, 0)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Append a token to every row, int64 [R]; return the logits of the next."""
        longest = max(self.lengths) + 1
        self._cache.reserve(longest)
        self._cache.prompts = None
        lengths = torch.tensor(self.lengths, device=self.model.device)
        rows = torch.arange(len(lengths), device=lengths.device)
        self._cache.slots, self._cache.width = rows * self._cache.capacity + lengths, longest
        mask = torch.arange(longest, device=lengths.device) <= lengths[:, None]
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(token_ids[:, None]),
            attention_mask={"full_attention": mask[:, None, None, :]},
            position_ids=lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits(hidden[:, -1])

    @torch.inference_mode()
    def leave(self, rows: Sequence[int]) -> list[int]:
        """Remove rows; the last ones move to their places.

        Returns:
            For every row that is left, in order, the number it had.
        """
        numbers = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            last = len(numbers) - 1
            if row != last:
                self._cache.copy_row(last, row, self.lengths[last])
                numbers[row], self.lengths[row] = numbers[last], self.lengths[last]
            numbers.pop()
            self.lengths.pop()
        return numbers

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).float()
