"""python -m tests.ranks MODULE WORLD FOLDER ARGUMENT...: MODULE's `main` as the ranks of one job.

The module is imported once; its ranks are forked from there. Each finds RANK, LOCAL_RANK and
WORLD_SIZE in its environment and calls main(FOLDER, ARGUMENT...); what it prints goes to
FOLDER/rankN.log. The exit code is that of the first rank that fails; the others are ended then.
"""

import faulthandler
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

from tests.processes import PATIENCE

# Nothing else is imported at the top: megatron-core's checkpoint writer spawns processes that
# import this file again.


def run(module: str, world: int, folder: Path, arguments: list[str]) -> int:
    """Fork the ranks and wait for them."""
    main = importlib.import_module(module).main
    os.environ["WORLD_SIZE"] = str(world)
    ranks = {}
    for rank in range(world):
        child = os.fork()
        if not child:
            os._exit(be_rank(main, rank, folder, arguments))
        ranks[child] = rank
    failed = 0
    while ranks:
        child, status = os.wait()
        del ranks[child]
        if status and not failed:
            failed = abs(os.waitstatus_to_exitcode(status))
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failed


def be_rank(main: object, rank: int, folder: Path, arguments: list[str]) -> int:
    """Run main in this process; return its exit code."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        main(folder, *arguments)  # type: ignore[operator]
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
