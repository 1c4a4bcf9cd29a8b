"""Builds ranks of a layout on the meta device and counts their parameters.

It runs as a process of its own (`python -m r1v3.plan.build`, one JSON object on stdin, one
on stdout), because the process group is a fake one and no device may be seen: megatron-core then
makes every weight without memory, the same on a laptop and on a machine with GPUs.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class RankLayout:
    """Layout that determines the modules of a rank.

    world: all ranks. stages: language layers of the first and last stage; None divides evenly.
    """

    world: int
    tensor: int
    pipeline: int
    sequence: bool
    first_stage_layers: int | None
    last_stage_layers: int | None
    dtype: str


@dataclass(frozen=True)
class BuiltRank:
    """One kind of rank: a pipeline stage on `ranks` equal tensor-parallel ranks.

    layers: language layers. parameters: of one rank, by part, padding included. whole: of all
    tensor-parallel ranks together, replicated ones once, without padding.
    """

    stage: int
    ranks: int
    layers: int
    parameters: dict[str, int]
    whole: dict[str, int]
    tensors: int


def build_ranks(model_folder: Path, layout: RankLayout) -> list[BuiltRank]:
    """Build the first and the last tensor-parallel rank of every stage in a child process.

    Raises:
        ValueError: the model cannot be laid out so; the message is the model's own.
        RuntimeError: the process failed or took longer than ten minutes.
    """
    request = json.dumps({"folder": str(model_folder), "layout": asdict(layout)})
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "r1v3.plan.build"],
            input=request,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"building the model took longer than {TIMEOUT_SECONDS} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"building the model failed: {last}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return _distinct([BuiltRank(**rank) for rank in answer["ranks"]], layout)


def _distinct(built: Sequence[BuiltRank], layout: RankLayout) -> list[BuiltRank]:
    """One entry for the equal ranks of a stage."""
    kinds: list[BuiltRank] = []
    for stage in range(layout.pipeline):
        ranks = [rank for rank in built if rank.stage == stage]
        if any(rank.parameters != ranks[0].parameters for rank in ranks):
            raise RuntimeError(f"tensor-parallel ranks of stage {stage} differ in size")
        kinds.append(ranks[0])
    return kinds


def _build(folder: str, layout: RankLayout) -> list[dict[str, Any]]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import InternVLConfig

    # What asks for the current device gets one without memory.
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    config = InternVLConfig.from_pretrained(folder)
    found = []
    for stage in range(layout.pipeline):
        for shard in sorted({0, layout.tensor - 1}):
            rank = stage * (layout.world // layout.pipeline) + shard
            dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
            try:
                parallel_state.initialize_model_parallel(
                    layout.tensor, layout.pipeline, create_gloo_process_groups=False
                )
                found.append(_count(config, layout, stage))
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
    return found


def _count(config: Any, layout: RankLayout, stage: int) -> dict[str, Any]:
    import torch

    from r1v3.model.megatron.internvl import InternVL
    from r1v3.model.megatron.options import ModelOptions
    from r1v3.model.parts import PARTS, part_of

    options = ModelOptions(
        dtype=getattr(torch, layout.dtype),
        sequence_parallel=layout.sequence,
        first_stage_layers=layout.first_stage_layers,
        last_stage_layers=layout.last_stage_layers,
    )
    with torch.device("meta"):
        model = InternVL(
            config,
            options,
            pre_process=stage == 0,
            post_process=stage == layout.pipeline - 1,
        )
    parameters = dict.fromkeys(PARTS, 0)
    whole = dict(parameters)
    padding = _Padding(config, options)
    tensors = 0
    for name, parameter in model.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        part = part_of(name)
        parameters[part] += parameter.numel()
        whole[part] += parameter.numel() * (layout.tensor if split else 1) - padding.of(name)
        tensors += 1
    return asdict(
        BuiltRank(
            stage,
            layout.tensor,
            len(model.language_model.decoder.layers),
            parameters,
            whole,
            tensors,
        )
    )


class _Padding:
    """Elements of a whole tensor that no checkpoint has."""

    def __init__(self, config: Any, options: Any) -> None:
        vision, text = config.vision_config, config.text_config
        size = vision.hidden_size // vision.num_attention_heads
        heads = (options.padded_heads(config) - vision.num_attention_heads) * size
        rows = options.padded_vocab(config) - text.vocab_size
        self.vision = {
            "linear_qkv.weight": 3 * heads * vision.hidden_size,
            "linear_qkv.bias": 3 * heads,
            "linear_proj.weight": heads * vision.hidden_size,
            "q_layernorm.weight": heads,
            "k_layernorm.weight": heads,
        }
        self.language = {
            "word_embeddings.weight": rows * text.hidden_size,
            "output_layer.weight": rows * text.hidden_size,
        }

    def of(self, name: str) -> int:
        table = self.vision if name.startswith("vision_model.") else self.language
        if name.startswith("vision_projection."):
            return 0
        return next((count for end, count in table.items() if name.endswith(end)), 0)


def main() -> None:
    """The child process."""
    warnings.filterwarnings("ignore")
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {
            "ranks": _build(request["folder"], RankLayout(**request["layout"])),
        }
    except (ValueError, AssertionError) as error:
        answer = {"error": str(error) or "megatron-core refuses this layout"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
