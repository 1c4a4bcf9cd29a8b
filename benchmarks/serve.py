"""Throughput of `r1v3 serve` over HTTP at 1 and 8 clients, beside transformers' own servers.

    python -m benchmarks.serve [--model FOLDER] [--tokens 64] [--requests 16] [--json FILE]
        [--transformers-python .venvs/clients/bin/python]

Every request has the same picture and question and gets exactly `tokens` tokens at temperature 1.
`generate` runs in this process without HTTP: one request after the other, as a server over it
answers them, and all requests of a wave as one batch, which no server can know before they arrive.
With the interpreter of an environment that has `transformers[serving]` (`python -m
tests_stacks.environments clients` makes one), `transformers serve` answers the same questions
without the picture. It is given the language model alone, as a folder of its own: the processor of
a picture model of InternVL needs torchvision.
The measures take turns, and the median of the rounds is shown. CPU time is that of the server's
process, or of this one for `generate`, so that it hardly depends on what else the machine does.
"""

import argparse
import base64
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import ROOT, header, warnings
from r1v3.data.encoding import collate
from r1v3.data.sample import make_sample
from r1v3.data.special_tokens import TURN_END
from r1v3.data.tokenizer import load_tokenizer, token_id
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


@dataclass(frozen=True)
class Server:
    """A server that runs: where it answers, its process, and the name of its model."""

    address: str
    pid: int
    model: str


@contextmanager
def server(model: Path) -> Iterator[Server]:
    """Start `r1v3 serve` with one thread."""
    command = [sys.executable, "-m", "r1v3", "serve", str(model), "port=0", "threads=1", "name=m"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"(http://\S+)/v1", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            yield Server(found[1], process.pid, "m")
        finally:
            process.terminate()


def write_language_model(model: Path, folder: Path) -> None:
    """Write the language model of a picture model as a folder of its own, which samples."""
    net = load_model(model)
    language = AutoModelForCausalLM.from_config(net.config.text_config)
    language.model.load_state_dict(net.model.language_model.state_dict())
    language.lm_head.load_state_dict(net.lm_head.state_dict())
    language.generation_config.do_sample = True
    language.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)


@contextmanager
def transformers_server(python: Path, folder: Path) -> Iterator[Server]:
    """Start `transformers serve` with one thread; what it says goes to a file in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-c", "from transformers.cli.transformers import main; main()", "serve",
               folder, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1",
               "--port", str(port)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / "serve.log"
    with (
        log.open("wb") as said,
        subprocess.Popen(
            list(map(str, command)), env=environment, stdout=said, stderr=said
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            if not answers(f"{address}/health", process):
                raise RuntimeError(f"transformers serve did not start: {log.read_text()[-2000:]}")
            yield Server(address, process.pid, str(folder))
        finally:
            process.terminate()


def answers(url: str, process: subprocess.Popen[bytes], seconds: float = 300.0) -> bool:
    """Wait until a server answers; False if it ends or takes longer."""
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < seconds:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return True
        except httpx.TransportError:
            time.sleep(0.2)
    return False


class Client:
    """Sends requests of one form to a server, with the picture or without it."""

    def __init__(self, server: Server, tokens: int, stop_id: int, *, picture: bool = True) -> None:
        self._address, self._tokens = server.address, tokens
        content: list[dict[str, object]] = [{"type": "text", "text": QUESTION}]
        if picture:
            data = base64.b64encode(PICTURE.read_bytes()).decode()
            address = f"data:image/png;base64,{data}"
            content.insert(0, {"type": "image_url", "image_url": {"url": address}})
        self._body = {
            "model": server.model, "messages": [{"role": "user", "content": content}],
            "temperature": 1.0, "chat_template_kwargs": {"enable_thinking": False},
            "max_tokens": tokens, "logit_bias": {str(stop_id): -100.0},
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


Measure = tuple[Callable[[], None], Callable[[], float]]


def clients_of(name: str, one: Server, client: Client, requests: int) -> dict[str, Measure]:
    """The measures of one server, at 1 and 8 clients."""
    return {
        f"{name}, {count} client{'s' if count > 1 else ''}": (
            partial(client.wave, requests, count),
            partial(cpu_of, one.pid),
        )
        for count in (1, 8)
    }


def measure(
    model: Path, tokens: int, requests: int, rounds: int, python: Path | None
) -> dict[str, Measured]:
    """Run all measures in turns; return their medians.

    Args:
        python: the interpreter of an environment that has `transformers[serving]`.
    """
    torch.set_num_threads(1)
    policy = load_policy(model)
    generate = generator(model, policy, tokens)
    stop_id = token_id(policy.tokenizer, TURN_END)
    found: dict[str, list[Measured]] = {}
    with ExitStack() as stack:
        own = stack.enter_context(server(model))
        measures = clients_of("r1v3 serve", own, Client(own, tokens, stop_id), requests)
        measures["generate, one by one"] = partial(generate, requests, 1), time.process_time
        measures["generate, batches of 8"] = partial(generate, requests, 8), time.process_time
        if python is not None:
            text = Client(own, tokens, stop_id, picture=False)
            measures |= clients_of("r1v3 serve, text", own, text, requests)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_language_model(model, folder)
            other = stack.enter_context(transformers_server(python, folder))
            text = Client(other, tokens, stop_id, picture=False)
            measures |= clients_of("transformers serve, text", other, text, requests)
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
    parser.add_argument(
        "--transformers-python", type=Path, help="interpreter that has transformers[serving]"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    facts = header("cpu")
    settings = {"tokens": options.tokens, "requests": options.requests, "rounds": options.rounds}
    result = measure(options.model, **settings, python=options.transformers_python)
    print(f"{'':36} {'tokens/s':>9} {'tokens/CPU s':>13}")
    for name, one in result.items():
        print(f"{name:36} {one.per_second:9.0f} {one.per_cpu_second:13.0f}")
    for line in warnings(facts):
        print(f"note: {line}")
    if options.json is not None:
        values = {name: vars(one) for name, one in result.items()}
        write_json(options.json, {"header": facts, "settings": settings, "results": values})


if __name__ == "__main__":
    main()
