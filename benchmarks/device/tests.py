"""The kernels' tests, a process for each file, the longest files first.

A file that takes its process with it, or does not end, loses its own results alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.device.plan import ROOT
from r1v3 import files

# Files with tests for a GPU, first those that make most kernels compile.
GPU_FILES = (
    "test_logprobs_and_entropy.py",
    "test_sample_tokens.py",
    "test_row_temperature.py",
    "test_softcap.py",
    "test_several_labels.py",
    "test_linear_grpo.py",
    "test_logits_grpo_loss.py",
    "test_device_contract.py",
    "test_grpo_loss.py",
    "test_linear_edges.py",
    "test_properties.py",
    "test_compile.py",
    "test_opcheck.py",
    "test_grpo_edges.py",
    "test_linear.py",
    "test_logits_memory.py",
    "test_linear_persistent.py",
    "test_group_advantages.py",
    "test_linear_compile.py",
    "test_ban_tokens.py",
    "test_vocab_parallel.py",
)
POLL_SECONDS = 0.1


@dataclass
class File:
    """A file whose tests run."""

    path: str
    process: subprocess.Popen[bytes]
    report: Path
    start: float


def start(path: str, folder: Path, gpu: bool) -> File:
    """Start pytest on one file."""
    report = folder / f"{Path(path).stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
               f"--junitxml={report}"]  # fmt: skip
    command += ["-m", "gpu", "--require-gpu"] if gpu else []
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [*command, path], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
    )
    return File(path, process, report, time.monotonic())


def outcome(file: File, status: int | None) -> dict[str, Any]:
    """Counts and failures of a file whose process has ended, or was ended (None)."""
    found: dict[str, Any] = {
        "file": file.path,
        "seconds": round(time.monotonic() - file.start, 1),
        "status": "timed out" if status is None else status,
        "passed": 0,
        "skipped": 0,
        "failed": [],
    }
    try:
        tree = ElementTree.parse(file.report)
    except (OSError, ElementTree.ParseError):
        return found
    for case in tree.iter("testcase"):
        bad = [x for kind in ("failure", "error") for x in case.iter(kind)]
        if bad:
            name = f"{Path(file.path).name}::{case.get('name')}"
            message = (bad[0].get("message") or "").splitlines() or [""]
            found["failed"].append({"test": name, "message": message[0][:200]})
        elif next(case.iter("skipped"), None) is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def document(ended: list[dict[str, Any]], waiting: list[str]) -> dict[str, Any]:
    """The JSON document: sums, failures and each file."""
    return {
        "passed": sum(file["passed"] for file in ended),
        "skipped": sum(file["skipped"] for file in ended),
        "failed": [test for file in ended for test in file["failed"]],
        "not_run": waiting,
        "files": ended,
    }


def run(paths: list[str], workers: int, seconds: float, target: Path, gpu: bool) -> bool:
    """Run the files; whether all have passed. Past the seconds nothing runs any longer."""
    end = time.monotonic() + seconds
    waiting, running, ended = list(paths), list[File](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="device-tests-") as name:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < workers:
                running.append(start(waiting.pop(0), Path(name), gpu))
            time.sleep(POLL_SECONDS)
            for file in [file for file in running if file.process.poll() is not None]:
                running.remove(file)
                ended.append(outcome(file, file.process.returncode))
                last = ended[-1]
                print(
                    f"{last['file']}: {last['passed']} passed, {len(last['failed'])} failed, "
                    f"{last['skipped']} skipped in {last['seconds']:.0f} s",
                    flush=True,
                )
                files.write_json(target, document(ended, waiting + [f.path for f in running]))
        for file in running:
            file.process.kill()
            file.process.wait()
            ended.append(outcome(file, None))
    found = document(ended, waiting)
    files.write_json(target, found)
    broken = [f["file"] for f in ended if f["status"] not in (0, 1, 5)] + waiting
    print(
        f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped"
        + (f"; no end of {', '.join(Path(path).name for path in broken)}" if broken else "")
    )
    # pytest ends with 5 where it found no test.
    return not waiting and all(file["status"] in (0, 5) for file in ended)


def main() -> int:
    """Run the tests; 1 unless all have passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.tests", description=__doc__)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--gpu", action="store_true", help="the tests for a GPU, of all files")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    chosen = options.files or [f"tests/kernels/{name}" for name in GPU_FILES]
    done = run(chosen, options.workers, options.seconds, options.json, options.gpu)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
