"""One rank of a job that runs MegatronEngine in many layouts; see test_megatron.py.

Writes what each case reports. A case that spans fewer ranks than there are runs on the first ones.
"""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.engine.megatron_cases import CASES
from tests.processes import PATIENCE


def main(folder: Path, names: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for name in names.split(","):
        world, case = CASES[name]
        if rank >= world:
            continue
        started = time.monotonic()
        os.environ["WORLD_SIZE"] = str(world)
        # A new world for every case: megatron-core leaves the groups of the last one behind.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / name}.rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE),
        )
        report = case(folder, name)
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(report))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
