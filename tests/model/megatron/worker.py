"""One of four processes that run InternVL in every parallel layout; see test_layouts.py.

Writes the results of its cases to a file.
"""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from r1v3.model.megatron import cpu

cpu.enable()

from tests.model.megatron.cases import CASES  # noqa: E402
from tests.model.megatron.reference import WORLD  # noqa: E402
from tests.processes import PATIENCE  # noqa: E402


def main(folder: Path, names: str) -> None:
    torch.set_num_threads(1)
    rank, results = int(os.environ["RANK"]), {}
    for name in names.split(","):
        start = time.monotonic()
        # A new world for every case: megatron-core leaves the groups of the last one behind.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / name}.rendezvous",
            rank=rank,
            world_size=WORLD,
            timeout=timedelta(seconds=PATIENCE),
        )
        results[name] = CASES[name](folder)
        dist.destroy_process_group()
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
