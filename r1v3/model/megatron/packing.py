"""A micro-batch as one sequence without padding, in which the samples of a prompt share its tokens.

The prompts stand first, one after the other, then the response of every sample. A segment is a run
of rows that attend together: a prompt attends to itself; a response attends to its prompt and to
itself. Both are causal with the last query at the last key, so a response's hidden states are those
of the concatenated sequence, while the prompt (and its images) is computed once for all G samples.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from r1v3.data.batch import Batch


@dataclass(frozen=True)
class Packed:
    """P prompts x G samples in T rows.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T], a token's position in its own prompt + response.
        query_starts: int32 [segments + 1], cumulative rows of the segments.
        key_starts: int32 [segments + 1], cumulative keys of the segments.
        key_index: int64 [keys], the row of each key, segment by segment.
        image_slots: bool [T], where image features go. They come from the prompts alone: an image
            token that was sampled into a response is text.
        pixel_values: float32 [tiles, 3, S, S] or None.
        prompt_starts: int64 [P + 1], cumulative rows of the prompts.
        hidden_rows: int64 [M], the row whose hidden state predicts each token that counts.
        token_ids: int64 [M], those tokens.
        places: int64 [M], their flat places in [P * G, R].
        shape: (P * G, R).
        segments: (rows, keys) of each segment, on the CPU.
        image_tokens: how many rows are image slots.
        longest: tokens of the longest prompt + response.
    """

    input_ids: Tensor
    position_ids: Tensor
    query_starts: Tensor
    key_starts: Tensor
    key_index: Tensor
    image_slots: Tensor
    pixel_values: Tensor | None
    prompt_starts: Tensor
    hidden_rows: Tensor
    token_ids: Tensor
    places: Tensor
    shape: tuple[int, int]
    segments: tuple[tuple[int, int], ...]
    image_tokens: int
    longest: int

    def to(self, device: torch.device | str) -> "Packed":
        """The same with every tensor on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def pack(batch: Batch, *, image_token_id: int, multiple_of: int = 1) -> Packed:
    """Pack a micro-batch. Tokens after the last that counts are left out.

    Args:
        batch: on the CPU, so that lengths are known without waiting for a device.
        image_token_id: the prompts' placeholder for one image feature.
        multiple_of: T is padded up to a multiple of it (the tensor-parallel size with sequence
            parallelism) by tokens that form a last segment of their own.

    Raises:
        ValueError: the batch has no prompt, or a prompt has no token.
    """
    mask, g = batch.prompt_mask, batch.group_size
    lengths = mask.sum(1)
    if not len(mask) or not bool(lengths.all()):
        empty = lengths.eq(0).nonzero().flatten().tolist()
        raise ValueError(f"prompts {empty} have no token" if len(mask) else "batch has no prompt")
    prompt_starts = _starts(lengths)
    rows, width = batch.response_ids.shape
    columns = torch.arange(width, device=mask.device)
    inputs = batch.input_lengths()
    is_input = columns < inputs.unsqueeze(1)
    response_starts = prompt_starts[-1] + _starts(inputs)
    prompt_of = torch.arange(len(mask), device=mask.device).repeat_interleave(g)
    before = lengths[prompt_of]

    predictors = torch.cat(
        [prompt_starts[1:][prompt_of].unsqueeze(1) - 1, response_starts[:-1, None] + columns], 1
    )[:, :width]
    position_ids = torch.cat(
        [(mask.long().cumsum(1) - 1)[mask], (before.unsqueeze(1) + columns)[is_input]]
    )
    segments = _segments(
        lengths,
        torch.stack([prompt_starts[:-1][prompt_of], response_starts[:-1]], 1),
        torch.stack([before, inputs], 1),
    )
    slots = batch.prompt_ids[mask] == image_token_id
    input_ids = torch.cat([batch.prompt_ids[mask], batch.response_ids[is_input]])
    padding = -len(input_ids) % multiple_of
    segments = segments.padded(padding, len(input_ids))
    none = torch.zeros(padding, dtype=torch.int64, device=mask.device)
    responses = torch.zeros(int(inputs.sum()) + padding, dtype=torch.bool, device=mask.device)
    return Packed(
        input_ids=torch.cat([input_ids, none]),
        position_ids=torch.cat([position_ids, none]),
        query_starts=_starts(segments.queries).int(),
        key_starts=_starts(segments.keys).int(),
        key_index=segments.key_index,
        image_slots=torch.cat([slots, responses]),
        pixel_values=batch.pixel_values,
        prompt_starts=prompt_starts,
        hidden_rows=predictors[batch.loss_mask],
        token_ids=batch.response_ids[batch.loss_mask],
        places=batch.loss_mask.flatten().nonzero().flatten(),
        shape=(rows, width),
        segments=tuple(zip(segments.queries.tolist(), segments.keys.tolist(), strict=True)),
        image_tokens=int(slots.sum()),
        longest=int((before + inputs).amax()),
    )


def pack_prompts(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    pixel_values: Tensor | None,
    *,
    image_token_id: int,
    multiple_of: int = 1,
) -> Packed:
    """Pack prompts alone, int64 and bool [P, L], to start decoding from; see `pack`."""
    nothing = prompt_ids.new_zeros(len(prompt_ids), 0)
    batch = Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        pixels=pixel_values,
        tiles=prompt_ids.new_zeros(len(prompt_ids)),
        response_ids=nothing,
        loss_mask=nothing.bool(),
    )
    return pack(batch, image_token_id=image_token_id, multiple_of=multiple_of)


@dataclass(frozen=True)
class _Segments:
    """Lengths of each segment, and the rows of all keys in order."""

    queries: Tensor
    keys: Tensor
    key_index: Tensor

    def padded(self, padding: int, rows: int) -> "_Segments":
        if not padding:
            return self
        length = self.queries.new_tensor([padding])
        return _Segments(
            torch.cat([self.queries, length]),
            torch.cat([self.keys, length]),
            torch.cat([self.key_index, rows + torch.arange(padding, device=length.device)]),
        )


def _segments(lengths: Tensor, starts: Tensor, counts: Tensor) -> _Segments:
    """Segments of the prompts, and of the samples whose responses have inputs.

    Args:
        lengths: [P], tokens of the prompts, which stand first.
        starts, counts: [P * G, 2], first row and rows of each sample's prompt and of its response.
    """
    samples = counts[:, 1].nonzero().flatten()
    starts, counts = starts[samples], counts[samples]
    prompts = torch.arange(int(lengths.sum()), device=lengths.device)
    return _Segments(
        queries=torch.cat([lengths, counts[:, 1]]),
        keys=torch.cat([lengths, counts.sum(1)]),
        key_index=torch.cat([prompts, _ranges(starts, counts)]),
    )


def _starts(lengths: Tensor) -> Tensor:
    """[0, l0, l0 + l1, ...], one longer than lengths."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... for every start and its length, one range after the other."""
    starts, lengths = starts.flatten(), lengths.flatten()
    before = _starts(lengths)
    offsets = (starts - before[:-1]).repeat_interleave(lengths)
    return offsets + torch.arange(int(before[-1]), device=offsets.device)
