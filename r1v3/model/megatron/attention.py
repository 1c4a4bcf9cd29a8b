"""Core attention of the layer specs: over packed segments, against a cache, or within image tiles.

The layout of attention travels with the hidden states in megatron-core's `packed_seq_params`, so
recomputed layers and the micro-batches that a pipeline keeps in flight each see their own layout.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from r1v3.model.megatron.context import ContextPart
from r1v3.model.megatron.packing import Packed


@functools.cache
def _installed_flash_attention() -> ModuleType | None:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


def flash_attention(tensor: Tensor) -> ModuleType | None:
    """The flash-attn package, where it is installed and takes this tensor."""
    if not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _installed_flash_attention()


class _GatherKeys(torch.autograd.Function):
    """rows[index], whose gradient adds up in float32 and in the order of the segments.

    A prompt's rows are keys of each of its samples; adding their gradients by atomic operations, or
    in bfloat16, would give other bits in every run or lose small terms. With a group the rows are
    those of all its ranks, in their order.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, lengths: list[int], group: ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(index)
        if group is not None:
            rows = gather_from_sequence_parallel_region(rows, group=group)
        ctx.shape, ctx.lengths, ctx.group = rows.shape, lengths, group
        return rows.index_select(0, index)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        total = torch.zeros(
            ctx.shape,
            dtype=torch.promote_types(gradient.dtype, torch.float32),
            device=gradient.device,
        )
        for rows, part in zip(index.split(ctx.lengths), gradient.split(ctx.lengths), strict=True):
            # Rows are distinct within a segment, so that nothing is added concurrently.
            total.index_add_(0, rows, part.to(total.dtype))
        if ctx.group is not None:
            total = reduce_scatter_to_sequence_parallel_region(total, group=ctx.group)
        return total.to(gradient.dtype), None, None, None


def _segment_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention [n, heads, d] of the last n of m keys [m, kv heads, d]."""
    n, m = len(query), len(key)
    q, k, v = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    gqa = q.shape[1] != k.shape[1]
    if n == m:
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:
        bias = causal_lower_right(n, m)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
    return mixed.squeeze(0).transpose(0, 1)


class AttentionLayout(PackedSeqParams):
    """The keys that each row of one forward pass attends to.

    It is megatron-core's own type only so that it passes through its layers; every tensor stays
    [T, 1, heads, d].
    """

    def __init__(self) -> None:
        super().__init__(qkv_format="sbhd")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, heads, d] from query [T, heads, d] and key, value [T, kv heads, d] of a layer."""
        raise NotImplementedError


class KeyValueCache:
    """Keys and values [rows, capacity, kv heads, d] of this stage's layers, by layer number.

    Args:
        lengths: int64 [prompts], tokens of each prompt.
        group_size: rows of each prompt.
        capacity: most tokens that will follow a prompt.
    """

    def __init__(self, lengths: Tensor, group_size: int, capacity: int) -> None:
        self.group_size = group_size
        self.longest = int(lengths.amax())
        self.capacity = self.longest + capacity
        self.lengths = lengths.repeat_interleave(group_size)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def fill(self, layer: int, key: Tensor, value: Tensor, prompt_starts: Tensor) -> None:
        """Keep what a layer computed for packed prompts, [T, kv heads, d], once for each row."""
        columns = torch.arange(self.longest, device=key.device)
        # Beyond a shorter prompt's end this reads other rows, which its length hides.
        rows = (prompt_starts[:-1, None] + columns).clamp(max=len(key) - 1)
        for kept, packed in ((self.keys, key), (self.values, value)):
            buffer = packed.new_zeros(len(self.lengths), self.capacity, *packed.shape[1:])
            buffer[:, : self.longest] = packed[rows].repeat_interleave(self.group_size, 0)
            kept[layer] = buffer

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token per row, [rows, kv heads, d], behind the others; the whole buffers."""
        rows = torch.arange(len(self.lengths), device=key.device)
        for kept, token in ((self.keys, key), (self.values, value)):
            kept[layer][rows, self.lengths] = token
        return self.keys[layer], self.values[layer]

    def advance(self) -> None:
        """Count the token that every layer has written."""
        self.lengths = self.lengths + 1
        self.longest += 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self.lengths = self.lengths.index_select(0, rows)
        for kept in (self.keys, self.values):
            for layer in kept:
                kept[layer] = kept[layer].index_select(0, rows)


class PackedLayout(AttentionLayout):
    """Segments of a packed sequence; with a `cache`, the keys and values are recorded in it.

    The keys and values of a `ContextPart` are those of all context-parallel ranks.
    """

    def __init__(self, packed: Packed, cache: KeyValueCache | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.cache = cache
        split = isinstance(packed, ContextPart)
        self.group = parallel_state.get_context_parallel_group() if split else None
        queries, keys = zip(*packed.segments, strict=True)
        self.query_lengths, self.key_lengths = list(queries), list(keys)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.cache is not None:
            self.cache.fill(layer, key, value, self.packed.prompt_starts)
        index = self.packed.key_index
        if self.group is not None or len(index) > len(query):
            key, value = (
                _GatherKeys.apply(x, index, self.key_lengths, self.group) for x in (key, value)
            )
        if (flash := flash_attention(query)) is not None:
            return flash.flash_attn_varlen_func(
                query,
                key,
                value,
                self.packed.query_starts,
                self.packed.key_starts,
                max(self.query_lengths),
                max(self.key_lengths),
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        segments = zip(
            query.split(self.query_lengths),
            key.split(self.key_lengths),
            value.split(self.key_lengths),
            strict=True,
        )
        return torch.cat([_segment_attention(*segment) for segment in segments])


class DecodeLayout(AttentionLayout):
    """One token of each row attends to the row's cache; tokens beyond the rows are padding."""

    def __init__(self, cache: KeyValueCache) -> None:
        super().__init__()
        self.cache = cache
        columns = torch.arange(cache.longest + 1, device=cache.lengths.device)
        self.visible = (columns <= cache.lengths.unsqueeze(1))[:, None, None, :]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, tokens = len(self.cache.lengths), len(query)
        keys, values = self.cache.extend(layer, key[:rows], value[:rows])
        query = query[:rows].unsqueeze(1)
        if (flash := flash_attention(query)) is not None:
            lengths = (self.cache.lengths + 1).int()
            mixed = flash.flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths)
        else:
            end = self.cache.longest + 1
            mixed = scaled_dot_product_attention(
                query.transpose(1, 2),
                keys[:, :end].transpose(1, 2),
                values[:, :end].transpose(1, 2),
                attn_mask=self.visible,
                enable_gqa=True,
            ).transpose(1, 2)
        return pad(mixed.squeeze(1), (0, 0, 0, 0, 0, tokens - rows))


def _tile_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention within each tile; everything is [tokens, tiles, heads, d]."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    if (flash := flash_attention(q)) is not None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash.flash_attn_func(q, k, v, deterministic=deterministic).transpose(0, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)


class CoreAttention(nn.Module):
    """softmax(q k / sqrt(d)) v for this rank's heads, over all tokens.

    With an `AttentionLayout` the tokens are [T, 1, heads, d] and attend as it says; without one
    they are [tokens, tiles, heads, d] and attend to all of their tile.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__()
        self.layer = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: AttentionLayout | None = None,
        **_: object,
    ) -> Tensor:
        """[T, 1, heads x d], or [tokens, tiles, heads x d]."""
        if packed_seq_params is None:
            mixed = _tile_attention(query, key, value)
            return mixed.reshape(*mixed.shape[:2], -1)
        mixed = packed_seq_params.attend(
            self.layer, query.squeeze(1), key.squeeze(1), value.squeeze(1)
        )
        return mixed.reshape(len(mixed), 1, -1)
