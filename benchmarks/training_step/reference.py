"""The model, the tokens and the truth of a benchmarked training step, written for its variants."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import machine
from benchmarks.training_step import heads
from benchmarks.training_step.engines import MODULES, Data, loss_on_head
from benchmarks.training_step.problem import FIRST_ID, REFERENCE, Workload
from r1v3 import files
from r1v3.data.batch import Batch
from r1v3.data.special_tokens import IMAGE_CONTEXT
from r1v3.data.tokenizer import load_tokenizer, token_id, train_tokenizer
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.flops import Dimensions, train_flops, work_of
from r1v3.model.internvl import build_model, internvl_config, load_model
from r1v3.model.parts import PARTS

SEED = 20250709
# Log-ratios to the old policy have this spread, so that some are clipped and the loss is not 0.
OLD_POLICY_NOISE = 0.1
PACKAGES = ("transformers", "megatron-core", "flash-attn", "trl")
TENSORS = "tokens.safetensors"


def write(workload: Workload, folder: Path) -> None:
    """Write model, tokens, and the loss, gradient norms and log-probs that are right.

    They come from HFEngine in float32 with a head of plain PyTorch operations. `old_logprobs` are
    its log-probs with noise.
    """
    facts = {**machine.header(workload.device), **_versions()}
    _write_model(workload, folder)
    model = load_model(folder, device=workload.device)
    engine = HFEngine(model, load_tokenizer(folder), modules=MODULES)
    batch, advantages, noise = random_tokens(workload, engine.config.image_token_id)
    nothing = torch.zeros_like(noise)
    data = Data(batch, advantages, nothing)
    with torch.no_grad():
        loss_fn = loss_on_head(workload, data, heads.reference)
        outputs = [loss_fn(engine.head(part), i)[1] for i, part in enumerate(data.micro_batches())]
    logprobs = torch.cat([output["token_logprobs"].cpu() for output in outputs])
    data = Data(batch, advantages, logprobs + noise)
    loss_fn = loss_on_head(workload, data, heads.reference)
    metrics, _ = engine.train_step(data.micro_batches(), loss_fn, learning_rate=0.0)
    _store(folder, data, logprobs)
    dims, work = Dimensions.of(engine.config), work_of(batch)
    files.write_json(
        folder / f"{REFERENCE}.json",
        {
            "header": facts,
            "parameters": dims.parameters(),
            "tokens_per_step": work.tokens,
            "flops_per_step": sum(train_flops(dims, work, MODULES).values()),
            "loss": metrics["loss"],
            "grad_norms": {part: metrics[f"grad_norm_{part}"] for part in PARTS},
        },
    )


def read(workload: Workload, folder: Path) -> tuple[Data, Tensor, dict[str, Any]]:
    """The tokens, the log-probs [P * G, R] that are right, and the rest of what `write` found."""
    tensors = load_file(folder / TENSORS)
    batch = Batch(
        tensors["prompt_ids"],
        torch.ones_like(tensors["prompt_ids"], dtype=torch.bool),
        tensors.get("pixel_values"),
        torch.full((workload.prompts,), workload.tiles),
        tensors["response_ids"],
        torch.ones_like(tensors["response_ids"], dtype=torch.bool),
        workload.group,
    )
    data = Data(batch, tensors["advantages"], tensors["old_logprobs"])
    found = json.loads((folder / f"{REFERENCE}.json").read_text(encoding="utf-8"))
    return data, tensors["logprobs"], found


def _store(folder: Path, data: Data, logprobs: Tensor) -> None:
    tensors = {
        "prompt_ids": data.batch.prompt_ids,
        "response_ids": data.batch.response_ids,
        "advantages": data.advantages,
        "old_logprobs": data.old_logprobs,
        "logprobs": logprobs,
    }
    if data.batch.pixel_values is not None:
        tensors["pixel_values"] = data.batch.pixel_values
    save_file(tensors, folder / TENSORS)


def _write_model(workload: Workload, folder: Path) -> None:
    """A random model, stored in bfloat16 so that every dtype starts from the same values."""
    tokenizer = train_tokenizer(["Nothing is encoded with this vocabulary."], 300)
    shape = workload.shape
    config = internvl_config(
        vocab_size=shape.vocab_size,
        image_token_id=token_id(tokenizer, IMAGE_CONTEXT),
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        vision=shape.vision,
        text=shape.text,
    )
    model = build_model(config, SEED)
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    HFEngine(model, tokenizer, modules=None).save(folder)


def random_tokens(workload: Workload, image_token_id: int) -> tuple[Batch, Tensor, Tensor]:
    """Prompts with pictures, responses, advantages [P * G], and the old policy's noise [P * G, R].

    Advantages are not centered on each prompt, or the loss would be a difference of equals.
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    rows, shape = workload.prompts * workload.group, workload.shape

    def ids(*size: int) -> Tensor:
        return torch.randint(FIRST_ID, shape.vocab_size, size, generator=generator)

    prompt_ids = ids(workload.prompts, workload.prompt_tokens)
    prompt_ids[:, : workload.tiles * shape.image_tokens] = image_token_id
    pixels = None
    if workload.tiles:
        size = (workload.prompts * workload.tiles, 3, shape.image_size, shape.image_size)
        pixels = torch.randn(size, generator=generator)
    responses = ids(rows, workload.response_tokens)
    batch = Batch(
        prompt_ids,
        torch.ones_like(prompt_ids, dtype=torch.bool),
        pixels,
        torch.full((workload.prompts,), workload.tiles),
        responses,
        torch.ones_like(responses, dtype=torch.bool),
        workload.group,
    )
    noise = torch.randn(responses.shape, generator=generator) * OLD_POLICY_NOISE
    return batch, torch.randn(rows, generator=generator), noise


def _versions() -> dict[str, Any]:
    """Of what computes beside torch, None where it is not installed."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
