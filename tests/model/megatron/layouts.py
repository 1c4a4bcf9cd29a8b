"""Parallel layouts of the tiny model in the processes of a worker, and a training step in them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor
from transformers import InternVLConfig

from r1v3.data.batch import Batch
from r1v3.kernels import linear_logprobs_and_entropy
from r1v3.model.megatron.hf_weights import export_hf, load_hf
from r1v3.model.megatron.internvl import InternVL
from r1v3.model.megatron.options import ModelOptions
from r1v3.model.megatron.packing import Packed, pack
from r1v3.model.parts import part_of
from tests.model.megatron import reference


@dataclass(frozen=True)
class RankLayout:
    """Use of the ranks; the rest is data parallel and does the same work again."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    @contextmanager
    def active(self) -> Iterator[None]:
        parallel_state.initialize_model_parallel(self.tensor, self.pipeline)
        model_parallel_cuda_manual_seed(7)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()

    def build(self, folder: Path, **options: Any) -> InternVL:
        """The model with the weights of a folder; of its three layers the first stage has one."""
        model = InternVL(
            InternVLConfig.from_pretrained(folder),
            ModelOptions(
                sequence_parallel=self.sequence,
                first_stage_layers=1 if self.pipeline == 2 else None,
                **options,
            ),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        load_hf(model, folder)
        return model


def freeze(model: InternVL, trained: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)


def packs_for(model: InternVL, batches: Sequence[Batch]) -> list[Packed]:
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    multiple = ranks if model.config.sequence_parallel else 1
    return [pack(b, image_token_id=reference.IMAGE, multiple_of=multiple) for b in batches]


def unpack(packed: Packed, values: Tensor) -> Tensor:
    """Values [M] of the tokens that count at their places in [P * G, R], 0 elsewhere."""
    rows, width = packed.shape
    return values.new_zeros(rows * width).index_copy(0, packed.places, values).view(rows, width)


def run(
    model: torch.nn.Module, batches: Sequence[Batch], *, backward: bool = True
) -> list[dict[str, Tensor]]:
    """The micro-batches through Megatron's schedule; on the last stage, what it saw of each.

    With `backward`, the gradient is that of the sum of `reference.loss` over the micro-batches.
    """
    inner: InternVL = getattr(model, "module", model)
    packs = packs_for(inner, batches)
    seen: list[dict[str, Tensor]] = []

    def forward(data: Iterator[Packed], stage: torch.nn.Module) -> tuple[Tensor, Callable]:
        packed = next(data)

        def of_hidden(hidden: Tensor, **_: object) -> tuple[Tensor, dict[str, Tensor]]:
            rows = inner.gather_hidden(hidden, reduce_grad=False)[packed.hidden_rows]
            logprobs, entropy = linear_logprobs_and_entropy(
                rows,
                inner.head_weight,
                packed.token_ids,
                vocab_size=inner.vocab_size,
                group=parallel_state.get_tensor_model_parallel_group(),
            )
            logprobs, entropy = (unpack(packed, values) for values in (logprobs, entropy))
            found = {"logprobs": logprobs, "entropy": entropy, "hidden": rows}
            seen.append({name: value.detach() for name, value in found.items()})
            return reference.loss(logprobs, entropy) * len(packs), {}

        return stage(packed), of_hidden

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(packs),
        model=model,
        num_microbatches=len(packs),
        seq_length=1,
        micro_batch_size=1,
        forward_only=not backward,
    )
    return seen


def sum_shared_gradients(model: InternVL) -> None:
    """Do what finalize_model_grads does beyond data parallelism, on plain `grad`."""
    if model.config.sequence_parallel:
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
                group = parallel_state.get_tensor_model_parallel_group()
                dist.all_reduce(parameter.grad, group=group)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    ends = model.pre_process or model.post_process
    if model.share_embeddings_and_output_weights and stages > 1 and ends:
        gradient = model.shared_embedding_or_output_weight().grad
        dist.all_reduce(gradient, group=parallel_state.get_embedding_group())


def distance(found: Tensor, expected: Tensor) -> float:
    """max |difference| / max |expected|."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / (scale or 1.0)


def gradients(model: InternVL) -> dict[str, Tensor]:
    """By HF name, the gradients of all ranks put together; None counts as zero."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        empty = parameter.grad is None
        parameter.data = torch.zeros_like(parameter.data) if empty else parameter.grad
    found = {name: tensor.clone() for name, tensor in export_hf(model)}
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    return found


def unequal_replicas(model: InternVL) -> list[str]:
    """Parameters that all tensor-parallel ranks hold whole, and whose gradients are not equal."""
    group = parallel_state.get_tensor_model_parallel_group()
    unequal = []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False) or parameter.grad is None:
            continue
        others = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size(group))]
        dist.all_gather(others, parameter.grad, group=group)
        if not all(torch.equal(others[0], other) for other in others):
            unequal.append(name)
    return unequal


def largest_padding(model: InternVL, of: Callable[[torch.nn.Parameter], Tensor | None]) -> float:
    """The largest magnitude of `of` (the value, the gradient) in padded heads and vocabulary."""
    config, largest = model.hf_config, 0.0
    rank = parallel_state.get_tensor_model_parallel_rank()

    def note(values: Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(values.abs().max()) if values.numel() else 0.0)

    def beyond(used: int, local: int) -> int:
        return max(0, min(local, used - rank * local))

    for name, parameter in model.named_parameters():
        values = of(parameter)
        if values is None:
            continue
        if "word_embeddings" in name or "output_layer" in name:
            note(values[beyond(model.vocab_size, len(values)) :])
        elif name.startswith("vision_model.decoder") and "self_attention" in name:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            local = model.options.padded_heads(config) // ranks
            first = beyond(config.vision_config.num_attention_heads, local)
            if name.endswith("linear_proj.weight"):
                note(values.view(len(values), local, -1)[:, first:])
            elif not name.endswith("linear_proj.bias"):
                note(values.view(local, -1)[first:])
    return largest
