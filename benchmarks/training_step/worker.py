"""One process of the training-step benchmark: `... training_step.worker FOLDER VARIANT`.

The variant "reference" comes first and writes what all others start from and must agree with.
"""

import gc
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.timing import Timing
from benchmarks.training_step.engines import build
from benchmarks.training_step.problem import REFERENCE, Workload
from benchmarks.training_step.reference import read, write
from r1v3 import files
from r1v3.model.parts import PARTS
from r1v3.trainer.telemetry import PEAK_FLOPS

LEARNING_RATE = 1e-6
# Loss in units of the mean |advantage|, gradient norms relative, mean error of log-probs in nats.
# At a log-prob of -12, bfloat16 is off by up to 3 %, and so is every entry of the logits' gradient:
# float32 logits of bfloat16 operands are ten times better.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "bfloat16 logits": 0.25}


@dataclass
class Row:
    """Facts of one variant.

    Attributes:
        status: "timed", "wrong" (and so never timed), "out of memory", "absent" or "failed".
        grad_norms: of each part, before clipping.
        errors: against the reference, in the units of `TOLERANCE`.
        tolerance: that every error must keep.
        timing: seconds per step.
        tokens_per_second: tokens that the model has to see, a prompt once for its whole group.
        tflops: model FLOPs of forward and backward for these tokens, per second.
        mfu: share of the device's dense bfloat16 peak, where that is known.
        peak_memory_bytes: CUDA: `torch.cuda.max_memory_allocated` of the timed steps; CPU: peak
            resident set of the process.
        resident_bytes: the same before the first step: weights and what the engine allocates.
    """

    variant: str
    status: str
    note: str = ""
    loss: float | None = None
    grad_norms: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    timing: Timing | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    resident_bytes: int | None = None

    def write(self, folder: Path) -> None:
        """Keep it for the parent."""
        files.write_json(folder / f"{self.variant}.json", asdict(self))


def measure(workload: Workload, folder: Path, variant: str) -> Row:
    """One step against the reference; if it is right, as many more as are to be timed.

    What does not fit in memory, or needs something that is not installed, is a row that says so.
    """
    row = Row(variant, "failed")
    try:
        _measure(workload, folder, row)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Row(variant, "out of memory", _first_line(error))
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return Row(variant, "out of memory", _first_line(error))
    except (ModuleNotFoundError, NotImplementedError) as error:
        return Row(variant, "absent", _first_line(error))
    return row


def _measure(workload: Workload, folder: Path, row: Row) -> None:
    data, logprobs, reference = read(workload, folder)
    engine, loss_fn = build(workload, folder, data, row.variant)
    micro_batches = data.micro_batches()
    gc.collect()
    row.resident_bytes = _memory(workload.device)
    metrics, outputs = engine.train_step(micro_batches, loss_fn, learning_rate=0.0)
    row.loss = metrics["loss"]
    row.grad_norms = {part: metrics[f"grad_norm_{part}"] for part in PARTS}
    row.errors = _errors(reference, row, float(data.advantages.abs().mean()))
    if outputs[0]:
        found = torch.cat([output["token_logprobs"] for output in outputs])
        row.errors["logprobs"] = float((found - logprobs).abs().mean())
    coarse = row.variant.endswith("bf16")
    row.tolerance = TOLERANCE["bfloat16 logits" if coarse else workload.dtype]
    if wrong := {name: e for name, e in row.errors.items() if not e <= row.tolerance}:
        row.status = "wrong"
        row.note = ", ".join(f"error of {name} is {error:.2g}" for name, error in wrong.items())
        row.note += f"; at most {row.tolerance:.2g} is allowed"
        return

    def step() -> float:
        _synchronize(workload.device)
        start = time.perf_counter()
        found, _ = engine.train_step(micro_batches, loss_fn, learning_rate=LEARNING_RATE)
        _synchronize(workload.device)
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(f"the loss of a timed step is {found['loss']}")
        return time.perf_counter() - start

    step()  # the first one allocates optimizer state
    if workload.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    row.timing = Timing.of([step() for _ in range(workload.repeats)])
    row.peak_memory_bytes = _peak_memory(workload.device)
    row.tokens_per_second = reference["tokens_per_step"] / row.timing.median
    rate = reference["flops_per_step"] / row.timing.median
    row.tflops, row.mfu = rate / 1e12, _share_of_peak(workload, rate)
    row.status = "timed"


def _errors(reference: Mapping[str, Any], row: Row, scale: float) -> dict[str, float]:
    assert row.loss is not None
    found = {"loss": abs(row.loss - reference["loss"]) / scale}
    for part, right in reference["grad_norms"].items():
        # A part that nothing passes through has no gradient: any at all is infinitely wrong.
        wrong = abs(row.grad_norms[part] - right)
        found[f"grad_norm_{part}"] = wrong / right if right else (math.inf if wrong else 0.0)
    return found


def _share_of_peak(workload: Workload, rate: float) -> float | None:
    if workload.device == "cpu" or workload.dtype != "bfloat16":
        return None
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name())
    return None if peak is None else rate / peak


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _memory(device: str) -> int | None:
    return machine.process_bytes("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def _peak_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Not getrusage where it can be helped: on Linux that also counts what started this process.
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        machine.process_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(folder: Path, variant: str) -> None:
    """Write `<variant>.json` into the folder, which holds the workload."""
    workload = Workload.read(folder)
    if variant == REFERENCE:
        write(workload, folder)
    else:
        measure(workload, folder, variant).write(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
