"""Work of the ranks: one function per case, each returning numbers for the tests to judge."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from safetensors.torch import load_file
from torch import Tensor

from r1v3.engine.megatron.decoder import Decoder
from r1v3.model.megatron.hf_weights import export_hf
from r1v3.model.megatron.internvl import InternVL
from r1v3.model.megatron.options import ModelOptions
from tests.model.megatron import reference
from tests.model.megatron.layouts import (
    RankLayout,
    distance,
    freeze,
    gradients,
    largest_padding,
    packs_for,
    run,
    sum_shared_gradients,
    unequal_replicas,
)

Result = dict[str, Any]


def parity(folder: Path, layout: RankLayout, which: str = "main", **options: Any) -> Result:
    """Distances from transformers of outputs and gradients, and what padding and replicas hold."""
    truth = load_file(folder / which / "truth.safetensors")
    with layout.active():
        model = layout.build(folder / which, **options)
        seen = run(model, reference.BATCHES[which])
        sum_shared_gradients(model)
        found = gradients(model)
        return {
            "outputs": {
                f"{index}.{name}": distance(value, truth[f"{index}.{name}"])
                for index, batch in enumerate(seen)
                for name, value in batch.items()
            },
            "gradients": {n: distance(g, truth[f"grad.{n}"]) for n, g in found.items()},
            "unequal_replicas": unequal_replicas(model),
            "padding": largest_padding(model, lambda parameter: parameter.grad),
        }


def recompute(folder: Path) -> Result:
    """Distances of gradients with layers computed again from those without.

    Two micro-batches of different length are in flight on the first of the two stages.
    """
    layout = RankLayout(2, 2, True)
    found = []
    with layout.active():
        for mode in ("none", "full"):
            model = layout.build(folder / "main", recompute=mode)
            run(model, reference.BATCHES["main"])
            found.append({n: p.grad for n, p in model.named_parameters()})
    return {"distances": {n: distance(found[1][n], kept) for n, kept in found[0].items()}}


def bfloat16(folder: Path) -> Result:
    """Largest error of the log-probs in bfloat16, everywhere the dtype goes."""
    truth = load_file(folder / "main" / "truth.safetensors")
    layout = RankLayout(2, 2, True)
    with layout.active():
        model = layout.build(folder / "main", dtype=torch.bfloat16, recompute="full")
        seen = run(model, reference.BATCHES["main"])
        errors = [
            float((batch["logprobs"] - truth[f"{index}.logprobs"]).abs().max())
            for index, batch in enumerate(seen)
        ]
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        return {"errors": errors, "finite": finite}


def frozen(folder: Path) -> Result:
    """Only the connector is trained: the second stage trains nothing, text trains nothing."""
    truth = load_file(folder / "main" / "truth.safetensors")
    layout = RankLayout(2, 2)
    with layout.active():
        model = layout.build(folder / "main")
        freeze(model, {"connector"})
        run(model, reference.BATCHES["main"])
        trained = [n for n, p in model.named_parameters() if p.grad is not None]
        found = gradients(model)
        connector = [name for name in found if "projector" in name]
        with_images = {n: distance(found[n], truth[f"grad.{n}"]) for n in connector}
        # The text-only micro-batch by itself reaches no trained parameter; it must still run.
        for parameter in model.parameters():
            parameter.grad = None
        run(model, reference.BATCHES["main"][1:])
        zeros = [float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None]
        return {"trained": trained, "gradients": with_images, "text_only": zeros}


def training(folder: Path, layout: RankLayout, which: str) -> Result:
    """Two steps of Megatron's DDP and distributed AdamW with weight decay."""
    batches = reference.BATCHES[which]
    stored = load_file(folder / which / "model.safetensors")
    with layout.active():
        model = layout.build(folder / which)
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-3,
                weight_decay=0.1,
                clip_grad=1.0,
                use_distributed_optimizer=True,
            ),
            [wrapped],
        )
        losses, norms = [], []
        for _ in range(2):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            seen = run(wrapped, batches)
            losses.append(sum(float(reference.loss(b["logprobs"], b["entropy"])) for b in seen))
            finalize_model_grads([wrapped])
            _, norm, _ = optimizer.step()
            norms.append(float(norm))
        padding = largest_padding(model, lambda parameter: parameter.data)
        moved = [name for name, tensor in export_hf(model) if not torch.equal(tensor, stored[name])]
        return {"losses": losses, "norms": norms, "padding": padding, "moved": len(moved)}


def decoding(folder: Path, layout: RankLayout, **options: Any) -> Result:
    """Logits of prefill and steps against transformers' over the whole sequences.

    Every row is given its response of the batch; after three tokens some rows are dropped.
    """
    truth = load_file(folder / "main" / "truth.safetensors")["logits"]
    batch = reference.BATCHES["main"][0]
    with layout.active():
        decoder = Decoder(layout.build(folder / "main", **options))
        tokens = batch.response_ids
        found = decoder.prefill(batch, batch.group_size, tokens.shape[1] - 1)
        rows = torch.arange(len(tokens))
        errors, digest = [distance(found, truth[:, 0])], [found.double().sum()]
        for step in range(tokens.shape[1] - 1):
            if step == 3:
                rows = torch.tensor([0, 2, 3])
                decoder.select(rows)
            found = decoder.step(tokens[rows, step])
            errors.append(distance(found, truth[rows, step + 1]))
            digest.append(found.double().sum())
        everyone = [torch.empty(len(digest), dtype=torch.float64) for _ in range(4)]
        dist.all_gather(everyone, torch.stack(digest))
        refusals = []
        for attempt in (
            lambda: decoder.step(tokens[rows, 0]),
            lambda: decoder.step(tokens[:2, 0]),
        ):
            try:
                attempt()
            except ValueError as error:
                refusals.append(str(error))
        return {
            "errors": errors,
            "same": all(torch.equal(everyone[0], other) for other in everyone),
            "graph": found.requires_grad,
            "refusals": refusals,
        }


def outputs(model: InternVL, batches: list) -> list[Tensor]:
    """Log-probs on the last stage, without gradients."""
    with torch.no_grad():
        return [seen["logprobs"] for seen in run(model, batches, backward=False)]


def checkpoint(folder: Path, which: str) -> Result:
    """Weights saved at TP2 x PP2 and loaded at TP1 and TP4: their bits and what they compute."""
    stored = load_file(folder / which / "model.safetensors")
    truth = load_file(folder / which / "truth.safetensors")
    place = folder / f"checkpoint-{which}"
    if dist.get_rank() == 0:
        place.mkdir()
    dist.barrier()
    layout = RankLayout(2, 2)
    with layout.active():
        dist_checkpointing.save(
            {"model": layout.build(folder / which).sharded_state_dict()}, str(place)
        )
    result: Result = {"unequal": {}, "outputs": {}}
    for layout in (RankLayout(1), RankLayout(4, 1, True)):
        with layout.active():
            model = layout.build(folder / which)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(7.0)
            loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(place))
            model.load_state_dict(loaded["model"])
            result["unequal"][f"tp{layout.tensor}"] = [
                name for name, tensor in export_hf(model) if not torch.equal(tensor, stored[name])
            ]
            (found,) = outputs(model, reference.BATCHES[which][:1])
            result["outputs"][f"tp{layout.tensor}"] = distance(found, truth["0.logprobs"])
            result["padding"] = largest_padding(model, lambda parameter: parameter.data)
    return result


def fresh(folder: Path) -> Result:
    """A new model has zero padding, and a forward without gradients keeps no graph."""
    with RankLayout(2).active():
        model = InternVL(reference.CONFIGS["plain"], ModelOptions())
        (packed,) = packs_for(model, reference.BATCHES["plain"])
        with torch.no_grad():
            hidden = model(packed)
        return {
            "padding": largest_padding(model, lambda parameter: parameter.data),
            "graph": hidden.requires_grad,
            "finite": bool(hidden.isfinite().all()),
        }


def refusals(folder: Path) -> Result:
    """Messages for models that cannot be built or split, and for batches that do not fit."""
    config = reference.CONFIGS["main"]
    other = reference.tiny_config()
    other.vision_config.norm_type = "batch_norm"
    scaled = reference.tiny_config()
    scaled.text_config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    found = {}
    with RankLayout(4).active():
        model = RankLayout(4).build(folder / "main")
        batch = reference.BATCHES["main"][0]
        tiles = batch.pixel_values
        assert tiles is not None
        dynamic = reference.tiny_config()
        dynamic.text_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4}
        dynamic.text_config.max_position_embeddings = 16
        for name, attempt in {
            "heads": lambda: InternVL(config, ModelOptions(head_multiple=1)),
            "vocabulary": lambda: InternVL(config, ModelOptions(vocab_multiple=1)),
            "stages": lambda: InternVL(config, ModelOptions(first_stage_layers=2)),
            "norm": lambda: InternVL(other, ModelOptions()),
            "rope": lambda: InternVL(scaled, ModelOptions()),
            "features": lambda: model(*packs_for(model, [replace(batch, pixels=tiles[1:])])),
            "no_images": lambda: model(*packs_for(model, [replace(batch, pixels=None)])),
            "side": lambda: model(*packs_for(model, [replace(batch, pixels=tiles[..., :42, :42])])),
            "length": lambda: InternVL(dynamic, ModelOptions())(*packs_for(model, [batch])),
        }.items():
            try:
                attempt()
                found[name] = "accepted"
            except ValueError as error:
                found[name] = str(error)
    return found


CASES: dict[str, Callable[[Path], Result]] = {
    "tp1": partial(parity, layout=RankLayout()),
    "tp2": partial(parity, layout=RankLayout(2)),
    "pp2": partial(parity, layout=RankLayout(1, 2)),
    "tp2_pp2": partial(parity, layout=RankLayout(2, 2)),
    "tp2_sp": partial(parity, layout=RankLayout(2, 1, True)),
    "tp4_sp": partial(parity, layout=RankLayout(4, 1, True)),
    "tp2_pp2_sp_recompute": partial(parity, layout=RankLayout(2, 2, True), recompute="full"),
    "tied_tp2_pp2": partial(parity, layout=RankLayout(2, 2), which="tied"),
    "tied_tp2": partial(parity, layout=RankLayout(2), which="tied"),
    "plain_tp2": partial(parity, layout=RankLayout(2), which="plain"),
    "wide_tp2": partial(parity, layout=RankLayout(2), which="wide"),
    "recompute": recompute,
    "bfloat16": bfloat16,
    "frozen": frozen,
    "training_tp2": partial(training, layout=RankLayout(2), which="main"),
    "training_tied_tp2_pp2_sp": partial(training, layout=RankLayout(2, 2, True), which="tied"),
    "decode_tp1": partial(decoding, layout=RankLayout()),
    "decode_tp2_sp": partial(decoding, layout=RankLayout(2, 1, True)),
    "decode_pp2": partial(decoding, layout=RankLayout(1, 2)),
    "decode_tp2_pp2_sp": partial(decoding, layout=RankLayout(2, 2, True), recompute="full"),
    "decode_tp4": partial(decoding, layout=RankLayout(4)),
    "checkpoint_main": partial(checkpoint, which="main"),
    "checkpoint_tied": partial(checkpoint, which="tied"),
    "fresh": fresh,
    "refusals": refusals,
}
