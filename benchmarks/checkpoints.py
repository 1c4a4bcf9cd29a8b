"""`python -m benchmarks.checkpoints`: memory and time of a Megatron checkpoint, rank by rank.

Data-parallel ranks on gloo hold a bfloat16 model of about 90 M parameters with its distributed
optimizer, save it, and load it again. Told is, for every rank:

- share: bytes of the optimizer's state that the rank holds, which is what it has to write of it;
- save, load: by how much the resident memory peaked above where it stood, over the share;
- blocking: seconds in which training waits, of all seconds until the checkpoint is in place; and
  the same of the processor's seconds, which other work on the machine does not change: those of the
  training thread while it waits for the checkpoint, of all that the rank and its children took.

Memory is that of the ranks, pages that a forked child shares included. A file system in memory
makes the writing cheap and the share of blocking high.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import machine
from r1v3 import files
from r1v3.config import Parallel, Stage
from r1v3.data.special_tokens import IMAGE_CONTEXT
from r1v3.data.tokenizer import token_id, train_tokenizer
from r1v3.engine.megatron.engine import MegatronEngine
from r1v3.engine.megatron.ranks import connect
from r1v3.model.internvl import build_model, internvl_config
from r1v3.model.parts import PARTS
from r1v3.ranks import leave_job
from r1v3.trainer.checkpoint import load_checkpoint, start_checkpoint

SCHEMA = 1
VISION = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
}
TEXT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "max_position_embeddings": 1024,
}


@dataclass
class Cost:
    """Costs of one rank; memory in bytes, times in seconds."""

    share: int
    save_peak: int = 0
    load_peak: int = 0
    blocking: float = 0.0
    total: float = 0.0
    blocking_cpu: float = 0.0
    total_cpu: float = 0.0


class _Peak:
    """The growth of resident memory since it was made."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before = self._resident("VmRSS")

    def bytes(self) -> int:
        return self._resident("VmHWM") - self._before

    def _resident(self, name: str) -> int:
        size = machine.process_bytes(name)
        assert size is not None
        return size


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@contextmanager
def _waiting(cost: Cost) -> Iterator[None]:
    """Count a block as time in which training waits."""
    started, cpu = time.perf_counter(), time.thread_time()
    yield
    cost.blocking += time.perf_counter() - started
    cost.blocking_cpu += time.thread_time() - cpu


def _optimizer_state(engine: MegatronEngine) -> Iterator[torch.Tensor]:
    for chained in engine.optimizer.optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                yield from (one for one in chained.optimizer.state[parameter].values() if one.dim())


def measure(folder: Path, layers: int) -> None:
    """Save and load on this rank of a job; write its costs to the folder."""
    torch.set_num_threads(1)
    ranks = connect(Parallel())
    tokenizer = train_tokenizer(["Nothing is encoded with this vocabulary."], 300)
    config = internvl_config(
        vocab_size=8192,
        image_token_id=token_id(tokenizer, IMAGE_CONTEXT),
        image_size=64,
        patch_size=8,
        vision=VISION,
        text={**TEXT, "num_hidden_layers": layers},
    )
    ranks.on_main(lambda: build_model(config, 0).save_pretrained(folder / "model"))
    stage = Stage(run=folder, engine="megatron", dtype="bfloat16")
    modules = dict.fromkeys(PARTS, True)
    engine = MegatronEngine(folder / "model", tokenizer, stage, ranks, modules=modules)
    for tensor in _optimizer_state(engine):
        tensor.uniform_()  # zeros that nothing was written to take no memory
    costs = []
    # The first save also loads libraries.
    for step in (1, 2):
        cost = Cost(share=sum(tensor.nbytes for tensor in _optimizer_state(engine)))
        ranks.barrier()
        peak, started, cpu = _Peak(), time.perf_counter(), _cpu()
        with _waiting(cost):
            pending = start_checkpoint(
                folder / "checkpoints",
                step,
                tensors={},
                state={},
                write_model=engine.save_state,
                model_bytes=engine.state_bytes(),
                ranks=ranks,
            )
        while True:
            with _waiting(cost):
                if pending.written():
                    break
            time.sleep(0.1)
        with _waiting(cost):
            path = pending.finish()
        cost.total, cost.total_cpu = time.perf_counter() - started, _cpu() - cpu
        cost.save_peak = peak.bytes()
        ranks.barrier()
        peak = _Peak()
        engine.load_state(path, load_checkpoint(path, ranks).tensors)
        cost.load_peak = peak.bytes()
        costs.append(cost)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(asdict(costs[-1])))
    ranks.barrier()
    leave_job()


def run(ranks: int, layers: int, folder: Path) -> list[Cost]:
    """The costs of every rank of a job that is started here."""
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", "benchmarks.checkpoints"),
            *("--rank-in", str(folder), "--layers", str(layers)),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return [Cost(**one) for one in found]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="language layers; 12 are 90 M")
    parser.add_argument("--folder", type=Path, help="where to save; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_in is not None:
        measure(options.rank_in, options.layers)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        costs = run(options.ranks, options.layers, Path(folder))
    for rank, cost in enumerate(costs):
        print(
            f"rank {rank}: share {cost.share / 1e6:,.0f} MB; peak over it: save "
            f"{cost.save_peak / cost.share:.2f}, load {cost.load_peak / cost.share:.2f}; blocking "
            f"{cost.blocking:.2f} of {cost.total:.2f} s ({cost.blocking / cost.total:.0%}), "
            f"{cost.blocking_cpu:.2f} of {cost.total_cpu:.2f} CPU seconds "
            f"({cost.blocking_cpu / cost.total_cpu:.0%})"
        )
    if options.json is not None:
        found = [asdict(cost) for cost in costs]
        files.write_json(options.json, {"schema": SCHEMA, **machine.header("cpu"), "ranks": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
