"""`r1v3 serve` in r1v3's own environment, for clients in theirs; and that environment's verbs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = "assets/tiny-internvl"


def r1v3(*words: str | Path) -> list[str]:
    """A command of Python in r1v3's own environment, `R1V3_PYTHON`."""
    return [os.environ.get("R1V3_PYTHON", sys.executable), "-m", *map(str, words)]


@contextmanager
def serving(*settings: str) -> Iterator[str]:
    """Serve the demo's base model; the value is the address, which ends in /v1."""
    command = r1v3("r1v3", "serve", MODEL, "port=0", *settings)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+/v1", server.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            server.terminate()


def verdicts(answers: list[dict[str, Any]], folder: Path) -> list[dict[str, bool | None]]:
    """Our verdicts on answers with the keys `text`, `answer` (the gold) and `options`."""
    path = folder / "answers.json"
    path.write_text(json.dumps(answers), encoding="utf-8")
    command = r1v3("tests_stacks.digits", "judge", path)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, bool | None]] = json.loads(done.stdout)
    return found
