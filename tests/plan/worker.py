"""Counts bytes in the real modules: run as a process of its own, one JSON line per case on stdin.

The process group is a fake one, whose collectives move nothing: this is one rank of a layout, with
tensors of the right size on the CPU.
"""

import json
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import InternVLConfig

from r1v3.data.batch import Batch
from r1v3.model.megatron import attention, cpu
from r1v3.model.megatron.context import context_part
from r1v3.model.megatron.internvl import InternVL
from r1v3.model.megatron.options import ModelOptions
from r1v3.model.megatron.packing import Packed, pack
from r1v3.model.parts import part_of


def batch(config: InternVLConfig, prompts: int, group: int, length: int, response: int) -> Batch:
    """Prompts of `length` tokens with two tiles each, and responses that all count."""
    side = config.vision_config.image_size[0]
    ids = torch.randint(10, 400, (prompts, length))
    ids[:, : 2 * config.image_seq_length] = config.image_token_id
    responses = torch.randint(10, 400, (prompts * group, response))
    return Batch(
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        pixels=torch.randn(2 * prompts, 3, side, side),
        tiles=torch.full((prompts,), 2),
        response_ids=responses,
        loss_mask=torch.ones_like(responses, dtype=torch.bool),
        group_size=group,
    )


def saved_bytes(model: InternVL, packed: Packed) -> tuple[int, torch.Tensor]:
    """Bytes of the storages that autograd keeps of a forward, parameters apart; its result."""
    ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(packed)
    return sum(size for size, _ in found.values()), result


class _NoScores(torch.autograd.Function):
    """Attention that keeps what fused attention keeps, without CausalBias, which the tracker
    below cannot handle."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        mixed = torch.zeros_like(inputs[0])
        ctx.save_for_backward(*inputs, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(saved) for saved in ctx.saved_tensors[:3])


def peak_bytes(model: InternVL, packed: Packed) -> int:
    """Most bytes at a time in a forward and backward, weights and their gradients apart."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(model)
    with mock.patch.object(attention, "_segment_attention", _NoScores.apply), tracker:
        result = model(packed)
        result.backward(torch.ones_like(result))
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return int(peak) - 2 * sum(parameter.nbytes for parameter in model.parameters())


def state_bytes(model: InternVL, element: int) -> dict[str, Any]:
    """Bytes of gradient buffers and of the distributed optimizer's shard after a step."""
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            bf16=element == 2,
            params_dtype=torch.bfloat16 if element == 2 else torch.float32,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    for buffer in ddp.buffers:
        buffer.grad_data.fill_(1e-3)
    optimizer.step()
    gradients = sum(buffer.grad_data.nbytes for buffer in ddp.buffers)
    masters, moments = 0, 0
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                # A float32 parameter is its own master: a view of the weights.
                masters += parameter.nbytes if element == 2 else 0
                state = chained.optimizer.state[parameter]
                moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    return {"gradients": gradients, "optimizer": masters + moments}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One rank of one layout."""
    config = InternVLConfig(**case["config"])
    tensor, stage, stages = case["tensor"], case["stage"], case["pipeline"]
    context = case["context"]
    world = tensor * stages * context * case["data"]
    rank = stage * (world // stages)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor, stages, context_parallel_size=context, create_gloo_process_groups=False
    )
    try:
        model_parallel_cuda_manual_seed(0)
        dtype = getattr(torch, case["dtype"])
        options = ModelOptions(
            dtype=dtype,
            sequence_parallel=case["sequence"],
            first_stage_layers=case["first"],
            recompute=case["recompute"],
        )
        model = InternVL(config, options, pre_process=stage == 0, post_process=stage == stages - 1)
        parts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            part = part_of(name)
            parts[part] = parts.get(part, 0) + parameter.numel()
            parameter.requires_grad_(case["modules"][part])
        given = batch(config, *case["pack"])
        if context == 1:
            packed = pack(given, image_token_id=config.image_token_id, multiple_of=tensor)
        else:
            whole = pack(given, image_token_id=config.image_token_id)
            packed = context_part(whole, 0, context, multiple_of=tensor)
        if stage:
            rows = len(packed.input_ids) // (tensor if case["sequence"] else 1)
            width = config.text_config.hidden_size
            model.set_input_tensor(torch.randn(rows, 1, width, dtype=dtype, requires_grad=True))
        saved, _ = saved_bytes(model, packed)
        found = {
            "parameters": parts,
            "saved": saved,
            "tokens": len(packed.input_ids),
            "keys": len(packed.key_index),
            "labels": len(packed.token_ids),
        }
        if case["peak"]:
            found["peak"] = peak_bytes(model, packed)
        return found | (state_bytes(model, dtype.itemsize) if case["state"] else {})
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    cpu.enable()
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)
