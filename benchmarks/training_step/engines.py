"""A variant's engine and loss function: MegatronEngine, HFEngine, or TRL's loss on the latter."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.training_step import heads
from benchmarks.training_step.problem import TRL, Workload
from r1v3.config import Stage
from r1v3.data.batch import Batch
from r1v3.data.tokenizer import load_tokenizer
from r1v3.engine.contract import Engine, LossFn
from r1v3.engine.head import Head
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.internvl import load_model
from r1v3.model.parts import PARTS

MODULES = dict.fromkeys(PARTS, True)


@dataclass(frozen=True)
class Data:
    """The tokens of a step and what they are trained against, on the CPU.

    batch: all prompts. advantages: float32 [P * G]. old_logprobs: float32 [P * G, R].
    """

    batch: Batch
    advantages: Tensor
    old_logprobs: Tensor

    def micro_batches(self) -> list[Batch]:
        """One prompt with its group each."""
        return [self.batch.slice(i, i + 1) for i in range(len(self.batch.prompt_ids))]


class AutocastEngine(HFEngine):
    """HFEngine with matrix products in bfloat16 over float32 weights, as `torch.autocast` does."""

    def head(self, batch: Batch) -> Head:
        """See `HFEngine.head`; the operands of the head's product are bfloat16."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            head = super().head(batch)
        return replace(head, hidden=head.hidden.bfloat16(), weight=head.weight.bfloat16())


class TrlEngine(HFEngine):
    """HFEngine's backward, clipping and AdamW below TRL's loss, which runs the model itself."""

    def head(self, batch: Batch) -> Head:
        """Nothing: the loss asks for no hidden states."""
        empty = self.model.lm_head.weight[:0]
        return Head(empty, empty, batch.response_ids[:0], batch.loss_mask[:0])


def build(workload: Workload, folder: Path, data: Data, variant: str) -> tuple[Engine, LossFn]:
    """The engine with the stored weights, ready to train all parts, and the variant's loss.

    Raises:
        ModuleNotFoundError, NotImplementedError: TRL is not there, or cannot take these tokens.
    """
    tokenizer = load_tokenizer(folder)
    if variant == TRL:
        engine = TrlEngine(load_model(folder, device=workload.device), tokenizer, modules=MODULES)
        return engine, _trl_loss(workload, engine, tokenizer, data, folder / TRL)
    name, _, head = variant.partition("-")
    loss_fn = loss_on_head(workload, data, heads.HEAD_LOSSES[head])
    if name == "megatron":
        return _megatron(workload, folder, tokenizer), loss_fn
    kind = HFEngine if workload.dtype == "float32" else AutocastEngine
    model = load_model(folder, device=workload.device)
    return kind(model, tokenizer, modules=MODULES), loss_fn


def _megatron(workload: Workload, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Engine:
    from r1v3.engine.megatron.engine import MegatronEngine
    from r1v3.engine.megatron.ranks import connect

    stage = Stage.model_validate(
        {
            "run": folder,
            "model": folder,
            "engine": "megatron",
            "device": workload.device,
            "dtype": workload.dtype,
        }
    )
    ranks = connect(stage.parallel, device=stage.device)
    return MegatronEngine(folder, tokenizer, stage, ranks, modules=MODULES)


def loss_on_head(
    workload: Workload,
    data: Data,
    loss: Callable[[Head, Tensor, Tensor, int], tuple[Tensor, dict[str, Tensor]]],
) -> LossFn:
    """The loss of micro-batch i, by one of the functions of `heads`."""
    old = data.old_logprobs.to(workload.device).split(workload.group)
    advantages = data.advantages.to(workload.device).split(workload.group)

    def loss_fn(head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(head, old[index], advantages[index], len(data.advantages))

    return loss_fn


def _trl_loss(
    workload: Workload,
    engine: HFEngine,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    folder: Path,
) -> LossFn:
    """`GRPOTrainer._compute_loss` on the same tokens, without activation checkpointing.

    TRL has no shared prompts: every response comes with its own copy of prompt and pictures.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    known = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    if workload.tiles and "num_tiles" not in known:
        raise NotImplementedError("this TRL takes no pictures in tiles; try --tiles 0 or TRL 1.16")
    settings = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=workload.group,
        num_generations=workload.group,
        gradient_accumulation_steps=workload.prompts,
        max_completion_length=workload.response_tokens,
        loss_type="grpo",
        epsilon=heads.CLIP,
        beta=0.0,
        temperature=1.0,
        bf16=workload.dtype == "bfloat16",
        use_cpu=workload.device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = GRPOTrainer(
        engine.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["-"] * workload.prompts * workload.group}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = workload.prompts
    engine.model.train()

    def loss_fn(_: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return trainer._compute_loss(trainer.model, _trl_inputs(workload, data, index)), {}

    return loss_fn


def _trl_inputs(workload: Workload, data: Data, index: int) -> dict[str, object]:
    """One micro-batch in TRL's layout: prompts padded on the left, completions on the right."""
    batch = data.batch.slice(index, index + 1).to(torch.device(workload.device))
    rows = slice(index * workload.group, (index + 1) * workload.group)
    inputs: dict[str, object] = {
        "prompt_ids": batch.prompt_ids.repeat_interleave(workload.group, 0),
        "prompt_mask": batch.prompt_mask.long().repeat_interleave(workload.group, 0),
        "completion_ids": batch.response_ids,
        "completion_mask": batch.loss_mask.long(),
        "advantages": data.advantages[rows].to(workload.device),
        "old_per_token_logps": data.old_logprobs[rows].to(workload.device),
    }
    if batch.pixel_values is not None:
        inputs["pixel_values"] = batch.pixel_values.repeat(workload.group, 1, 1, 1)
        inputs["num_tiles"] = [workload.tiles] * workload.group
        inputs["num_images"] = [workload.tiles] * workload.group
    return inputs
