"""One of four processes that run InternVL in every parallel layout; see test_layouts.py.

python -m tests.model.megatron.worker RANK FOLDER CASE,CASE: writes the cases' results to a file.
"""

import faulthandler
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

from tests.processes import PATIENCE

WORLD = 4


def main(rank: int, folder: Path, names: list[str]) -> None:
    # Not at the top: megatron-core's checkpoint writer spawns a process that imports this file.
    import torch
    import torch.distributed as dist

    from r1v3.model.megatron import cpu

    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    cpu.enable()
    from tests.model.megatron.cases import CASES

    results = {}
    for name in names:
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


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
