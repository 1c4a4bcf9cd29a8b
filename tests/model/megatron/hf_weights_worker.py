"""One of four processes that load, train, export and save a model; see test_hf_weights.py."""

import errno
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1v3.model.megatron import cpu

cpu.enable()

from megatron.core import parallel_state as state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from r1v3.data.batch import Batch  # noqa: E402
from r1v3.kernels import linear_logprobs_and_entropy  # noqa: E402
from r1v3.model.conversion import CheckpointError, load_config  # noqa: E402
from r1v3.model.megatron.hf_saving import write_hf  # noqa: E402
from r1v3.model.megatron.hf_weights import export_hf, load_hf  # noqa: E402
from r1v3.model.megatron.internvl import InternVL  # noqa: E402
from r1v3.model.megatron.options import ModelOptions  # noqa: E402
from r1v3.model.megatron.packing import Packed, pack  # noqa: E402
from r1v3.ranks import Ranks  # noqa: E402
from tests.model.conversion.checkpoints import IMAGE_TOKEN_ID  # noqa: E402
from tests.processes import PATIENCE  # noqa: E402

# Tensor- and pipeline-parallel size; data parallel over the rest.
LAYOUTS = {"tp2pp2": (2, 2), "tp4": (4, 1), "pp2": (1, 2)}


def build(folder: Path, dtype: torch.dtype = torch.float32) -> InternVL:
    """A model of this rank's layout whose every value is NaN, so that loading has to set it."""
    stages = state.get_pipeline_model_parallel_world_size()
    model = InternVL(
        load_config(folder),
        ModelOptions(dtype=dtype, first_stage_layers=1 if stages > 1 else None),
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def exported_equals(model: InternVL, expected: dict[str, Tensor], **options: object) -> bool:
    """Whether the export is exactly `expected`, names in order, bit for bit."""
    found = {name: tensor.clone() for name, tensor in export_hf(model, **options)}  # type: ignore[arg-type]
    return list(found) == list(expected) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def batch() -> Batch:
    tensors = load_file(FOLDER / "batch.safetensors")
    return Batch(
        prompt_ids=tensors["prompt_ids"],
        prompt_mask=torch.ones_like(tensors["prompt_ids"], dtype=torch.bool),
        pixels=tensors["pixel_values"],
        tiles=torch.ones(len(tensors["prompt_ids"]), dtype=torch.int64),
        response_ids=tensors["response_ids"],
        loss_mask=torch.ones_like(tensors["response_ids"], dtype=torch.bool),
        group_size=1,
    )


def run(model: InternVL, *, train: bool) -> Tensor | None:
    """Log-probs of the response on the last stage; with `train`, gradients are left behind."""
    packed, seen = pack(batch(), image_token_id=IMAGE_TOKEN_ID), []

    def forward(data: Iterator[Packed], stage: InternVL) -> tuple:
        def loss(hidden: Tensor) -> tuple[Tensor, dict]:
            logprobs, _ = linear_logprobs_and_entropy(
                stage.gather_hidden(hidden, reduce_grad=False)[packed.hidden_rows],
                stage.head_weight,
                packed.token_ids,
                vocab_size=stage.vocab_size,
                group=state.get_tensor_model_parallel_group(),
            )
            seen.append(logprobs.detach())
            return -logprobs.mean(), {}

        return stage(next(data)), loss

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([packed]),
        model=model,
        num_microbatches=1,
        seq_length=1,
        micro_batch_size=1,
        forward_only=not train,
    )
    return seen[0] if seen else None


def train_and_save(model: InternVL) -> dict[str, object]:
    """One step of gradient descent; what transformers has to find in the folder that is saved."""
    run(model, train=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    logprobs = run(model, train=False)
    save(model, FOLDER / "trained")
    if logprobs is not None and state.get_tensor_model_parallel_rank() == 0:
        save_file({"logprobs": logprobs}, FOLDER / "trained.logprobs.safetensors")
    result: dict[str, object] = {"padding": padding(model)}
    (FOLDER / "file").touch()
    result["folder is a file"] = save_error(model, FOLDER / "file")
    genuine, written = os.pwrite, []

    def full(*arguments: object) -> int:
        written.append(arguments)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*arguments)  # type: ignore[arg-type]

    os.pwrite = full
    result["disk is full"] = save_error(model, FOLDER / "full")
    os.pwrite = genuine
    return result


def save(model: InternVL, folder: Path) -> None:
    """Save in many files, into a folder that is made if nothing stands in its place."""
    if not folder.exists():
        folder.mkdir(exist_ok=True)
    write_hf(model, folder, ranks=Ranks(dist.group.WORLD), max_shard_bytes=30_000)


def save_error(model: InternVL, folder: Path) -> str:
    """The error that a rank sees when the first one cannot write."""
    try:
        save(model, folder)
    except OSError:
        return "OSError"
    return "nothing"


def padding(model: InternVL) -> float:
    """The largest padded value: vocabulary rows on the last tensor rank, heads beyond the fifth."""
    values = [torch.zeros(1)]
    rank, ranks = (
        state.get_tensor_model_parallel_rank(),
        state.get_tensor_model_parallel_world_size(),
    )
    if model.post_process:
        rows = model.head_weight.shape[0]
        values.append(model.head_weight[max(0, model.vocab_size - rank * rows) :].flatten())
    if model.pre_process:
        heads = 8 // ranks
        for layer in model.vision_model.decoder.layers:
            projection = layer.self_attention.linear_proj.weight.unflatten(1, (heads, -1))
            values.append(projection[:, max(0, 5 - rank * heads) :].flatten())
            fused = layer.self_attention.linear_qkv.weight.unflatten(0, (heads, -1))
            values.append(fused[max(0, 5 - rank * heads) :].flatten())
    return float(torch.cat(values).abs().max())


def layout(name: str, expected: dict[str, Tensor]) -> dict[str, object]:
    result: dict[str, object] = {}
    for source in ("native", "original"):
        model = build(FOLDER / source)
        load_hf(model, FOLDER / source)
        result[f"{source} comes back"] = exported_equals(model, expected)
    result["in small buckets"] = exported_equals(model, expected, bucket_bytes=5000)
    first = state.get_pipeline_model_parallel_rank() + state.get_tensor_model_parallel_rank() == 0
    result["to one"] = exported_equals(model, expected if first else {}, to_all=False)
    if name == "tp2pp2":
        try:
            load_hf(model, FOLDER / "broken")
        except CheckpointError as error:
            result["report"] = str(error)
        result["unchanged by a failure"] = exported_equals(model, expected)
        result |= train_and_save(model)
    if name == "pp2":
        tied = build(FOLDER / "tied")
        load_hf(tied, FOLDER / "tied")
        own = load_file(FOLDER / "tied.safetensors")
        result["tied"] = exported_equals(tied, {key: own[key] for key in expected if key in own})
        if tied.post_process:
            head = tied.head_weight[: tied.vocab_size]
            result["tied head"] = torch.equal(head, own["model.language_model.embed_tokens.weight"])
    if name == "tp4":
        half = build(FOLDER / "native", torch.bfloat16)
        load_hf(half, FOLDER / "native")
        rounded = {key: tensor.bfloat16() for key, tensor in expected.items()}
        result["in bfloat16"] = exported_equals(half, rounded)
    return result


def main(folder: Path) -> None:
    global FOLDER
    FOLDER, rank = folder, int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{FOLDER / 'rendezvous'}",
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=PATIENCE),
    )
    expected = load_file(FOLDER / "expected.safetensors")
    order = json.loads((FOLDER / "order.json").read_text())
    results = {}
    for name, (tensor, pipeline) in LAYOUTS.items():
        state.initialize_model_parallel(tensor, pipeline)
        model_parallel_cuda_manual_seed(7)
        results[name] = layout(name, {key: expected[key] for key in order})
        state.destroy_model_parallel()
    (FOLDER / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
