"""Decoding in the training layout: the same shards, ranks and stages, no second copy of weights.

A step is a forward pass of one token per row. Every tensor-parallel rank keeps the keys and values
of its own heads, every pipeline stage those of its own layers. Every rank gets the same logits, so
that all of them sample the same token from the same random numbers.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional

from r1v3.data.batch import Batch
from r1v3.model.megatron.attention import DecodeLayout, KeyValueCache, PackedLayout
from r1v3.model.megatron.internvl import InternVL
from r1v3.model.megatron.packing import pack_prompts


class Decoder:
    """A `contract.Decoder` over the ranks of a model, which call it with the same arguments.

    Args:
        model: this rank's part, unwrapped; every call uses its weights as they are then.
    """

    def __init__(self, model: InternVL) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.multiple_of = self.ranks if model.config.sequence_parallel else 1

    @torch.no_grad()
    def prefill(self, prompts: Batch, group_size: int, capacity: int) -> Tensor:
        """See `contract.Decoder.prefill`."""
        packed = pack_prompts(
            prompts.prompt_ids,
            prompts.prompt_mask,
            prompts.pixel_values if self.model.pre_process else None,
            image_token_id=self.model.hf_config.image_token_id,
            multiple_of=self.multiple_of,
        ).to(self.device)
        starts = packed.prompt_starts
        self._cache = KeyValueCache(starts.diff(), group_size, capacity)
        self._receive(len(packed.input_ids))
        hidden = self.model(packed, PackedLayout(packed, self._cache))
        last = (starts[1:] - 1).repeat_interleave(group_size)
        return self._logits(hidden, last)

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """See `contract.Decoder.step`.

        Raises:
            ValueError: token_ids does not have one token per row, or the capacity is used up.
        """
        cache = self._cache
        rows = len(cache.lengths)
        if token_ids.shape != (rows,):
            raise ValueError(f"{list(token_ids.shape)} token ids for {rows} rows")
        if cache.longest == cache.capacity:
            raise ValueError(f"the cache holds its {cache.capacity} tokens; prefill with more")
        padding = (0, -rows % self.multiple_of)
        position_ids = functional.pad(cache.lengths, padding)
        embedded = None
        if self.model.pre_process:
            embedded = self.model.embed_text(functional.pad(token_ids.to(self.device), padding))
        self._receive(len(position_ids))
        hidden = self.model.run_layers(
            embedded, position_ids, cache.longest + 1, DecodeLayout(cache)
        )
        cache.advance()
        return self._logits(hidden, torch.arange(rows, device=self.device))

    def select(self, rows: Tensor) -> None:
        """See `contract.Decoder.select`."""
        self._cache.select(rows.to(self.device))

    def _receive(self, tokens: int) -> None:
        """Receive the previous stage's activation of this many tokens."""
        if self.model.pre_process:
            return
        activation = torch.empty(
            tokens // self.multiple_of,
            1,
            self.model.config.hidden_size,
            dtype=self.model.config.pipeline_dtype,
            device=self.device,
        )
        previous = parallel_state.get_pipeline_model_parallel_prev_rank()
        dist.recv(activation, previous, group=self.pipeline_group)
        self.model.set_input_tensor(activation)

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits float32 [rows, V] on every rank, from the stage's output at these tokens."""
        model = self.model
        logits = torch.empty(len(rows), model.vocab_size, device=self.device)
        if model.post_process:
            local = self._local_logits(model.gather_hidden(hidden, reduce_grad=False)[rows])
            shards = [torch.empty_like(local) for _ in range(self.ranks)]
            dist.all_gather(shards, local, group=self.tensor_group)
            logits.copy_(torch.cat(shards, 1)[:, : model.vocab_size])
        else:
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            dist.send(hidden.contiguous(), following, group=self.pipeline_group)
        if dist.get_world_size(self.pipeline_group) > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(logits, last, group=self.pipeline_group)
        return logits

    def _local_logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the logits, accumulated in float32 as in training."""
        weight = self.model.head_weight
        if hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T
