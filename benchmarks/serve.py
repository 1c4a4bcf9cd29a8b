"""Throughput of `r1v3 serve` over HTTP at 1 and 8 clients, beside transformers' own `generate`.

    python -m benchmarks.serve [--model FOLDER] [--tokens 64] [--requests 16] [--json FILE]

Every request has the same picture and question and gets exactly `tokens` tokens at temperature 1.
`generate` runs in this process without HTTP: one request after the other, as a server over it
answers them, and all requests of a wave as one batch, which no server can know before they arrive.
The measures take turns, and the median of the rounds is shown. CPU time is that of the server's
process, or of this one for `generate`, so that it hardly depends on what else the machine does.
"""

import argparse
import base64
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import torch

from benchmarks.machine import ROOT, header, warnings
from r1v3.data.encoding import collate
from r1v3.data.sample import make_sample
from r1v3.data.special_tokens import TURN_END
from r1v3.data.tokenizer import token_id
from r1v3.evaluation.policy import Policy, load_policy
from r1v3.files import write_json
from r1v3.model.internvl import load_model

PICTURE, QUESTION = ROOT / "assets" / "example.png", "Compute the result."


@dataclass(frozen=True)
class Measured:
    """One wave of requests: tokens per second of wall time, and of CPU time."""

    per_second: float
    per_cpu_second: float


def timed(work: Callable[[], None], cpu: Callable[[], float], tokens: int) -> Measured:
    """Measure a wave that makes so many tokens."""
    wall, before = time.perf_counter(), cpu()
    work()
    return Measured(tokens / (time.perf_counter() - wall), tokens / max(cpu() - before, 1e-3))


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(model: Path) -> Iterator[tuple[str, int]]:
    """Start `r1v3 serve` with one thread; give its address and process id."""
    command = [sys.executable, "-m", "r1v3", "serve", str(model), "port=0", "threads=1", "name=m"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"(http://\S+)/v1", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            yield found[1], process.pid
        finally:
            process.terminate()


class Client:
    """Sends requests of one form to a server."""

    def __init__(self, address: str, tokens: int, stop_id: int) -> None:
        self._address, self._tokens = address, tokens
        picture = base64.b64encode(PICTURE.read_bytes()).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        content = [part, {"type": "text", "text": QUESTION}]
        self._body = {
            "model": "m", "messages": [{"role": "user", "content": content}], "mode": "nothink",
            "max_tokens": tokens, "logit_bias": {str(stop_id): -100},
        }  # fmt: skip

    def wave(self, requests: int, clients: int) -> None:
        """Send requests, each client its part of them one after the other."""

        def ask() -> None:
            with httpx.Client(base_url=self._address, timeout=600, trust_env=False) as client:
                for _ in range(requests // clients):
                    reply = client.post("/v1/chat/completions", json=self._body)
                    assert reply.json()["usage"]["completion_tokens"] == self._tokens, reply.text

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def generator(model: Path, policy: Policy, tokens: int) -> Callable[[int, int], None]:
    """Make the function that answers `requests` in batches with transformers' `generate`."""
    net = load_model(model).eval()
    data = [PICTURE.read_bytes()]
    sample = make_sample(
        question=QUESTION, ground_truth="", data_source="benchmark", index=0, images=data
    )
    example = policy.requests([sample], False)[0].example

    def answer(requests: int, batch: int) -> None:
        for _ in range(requests // batch):
            prompts = collate([example] * batch, policy.tokenizer.pad_token_id)
            made = net.generate(
                input_ids=prompts.prompt_ids,
                attention_mask=prompts.prompt_mask.long(),
                pixel_values=prompts.pixel_values,
                do_sample=True,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=policy.stop_id,
                pad_token_id=policy.tokenizer.pad_token_id,
            )
            assert made.shape[1] - prompts.prompt_ids.shape[1] in (0, tokens)

    return answer


def measure(model: Path, tokens: int, requests: int, rounds: int) -> dict[str, Measured]:
    """Run all measures in turns; return their medians."""
    torch.set_num_threads(1)
    policy = load_policy(model)
    generate = generator(model, policy, tokens)
    found: dict[str, list[Measured]] = {}
    with server(model) as (address, pid):
        client = Client(address, tokens, token_id(policy.tokenizer, TURN_END))
        measures: dict[str, tuple[Callable[[], None], Callable[[], float]]] = {
            "r1v3 serve, 1 client": (lambda: client.wave(requests, 1), lambda: cpu_of(pid)),
            "generate, one by one": (lambda: generate(requests, 1), time.process_time),
            "r1v3 serve, 8 clients": (lambda: client.wave(requests, 8), lambda: cpu_of(pid)),
            "generate, batches of 8": (lambda: generate(requests, 8), time.process_time),
        }
        for _ in range(rounds + 1):  # the first round warms up
            for name, (work, cpu) in measures.items():
                found.setdefault(name, []).append(timed(work, cpu, tokens * requests))
    return {
        name: Measured(
            median(one.per_second for one in waves[1:]),
            median(one.per_cpu_second for one in waves[1:]),
        )
        for name, waves in found.items()
    }


def main() -> None:
    """Measure, print and perhaps write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "tiny-internvl")
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--requests", type=int, default=16, help="of a wave, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    facts = header("cpu")
    result = measure(options.model, options.tokens, options.requests, options.rounds)
    print(f"{'':24} {'tokens/s':>9} {'tokens/CPU s':>13}")
    for name, one in result.items():
        print(f"{name:24} {one.per_second:9.0f} {one.per_cpu_second:13.0f}")
    for line in warnings(facts):
        print(f"note: {line}")
    if options.json is not None:
        values = {name: vars(one) for name, one in result.items()}
        settings = {"tokens": options.tokens, "requests": options.requests}
        write_json(options.json, {"header": facts, "settings": settings, "results": values})


if __name__ == "__main__":
    main()
