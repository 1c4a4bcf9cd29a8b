"""One op's benchmark in a process of its own: `python -m benchmarks.device.op OP ...`.

The same as `python -m benchmarks OP`, in plain lines, for a machine that has only what r1v3's
kernels need.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks import machine, peers
from benchmarks.ops import OPS
from benchmarks.session import SECONDS_PER_TASK, Session, cases


def main() -> int:
    """Measure; 1 if one of r1v3's kernels is wrong or a problem failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.op", description=__doc__)
    parser.add_argument("op", choices=tuple(OPS))
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--shapes", required=True, choices=("small", "full"))
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    session = Session(
        machine.header(options.device, options.commit), peers.project_names(),
        SECONDS_PER_TASK["small"], compiled=not options.no_compile, target=options.json,
    )  # fmt: skip
    for case in cases([options.op], options.device, options.shapes):
        if not session.has_time(options.seconds):
            session.skip(case)
            continue
        start = time.perf_counter()
        done = session.measure(case)
        print(*case, f"{time.perf_counter() - start:.1f} s", flush=True)
        for result in () if done is None else done[0].results:
            seconds = "-" if result.timing is None else f"{1e6 * result.timing.median:.1f} us"
            print(f"  {result.implementation}: {result.status} {seconds} {result.note}", flush=True)
    for title in session.wrong:
        print(f"r1v3 failed: {title}")
    return 1 if session.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
