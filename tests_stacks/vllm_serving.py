"""A vLLM server of the demo's model on this machine, in the environment of this process."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before anything imports torchvision.
import tests_stacks.torchvision_on_cpu.sitecustomize  # noqa: F401
from tests_stacks.serving import MODEL, ROOT

# vLLM needs minutes to start on two busy cores, and one process compiles nothing.
START_SECONDS = 540
# Longer prompts than this many tokens would be computed in parts, for which vLLM's seeded random
# numbers have no form on a CPU.
BATCHED_TOKENS = 16384
# Prompt and completion of the demo's questions.
MAX_LENGTH = 384


def environment() -> dict[str, str]:
    """The variables with which vLLM runs on a CPU, with the installed torchvision."""
    folders = [str(ROOT / "tests_stacks" / "torchvision_on_cpu"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(START_SECONDS),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def vllm_serving(model: Path, log: Path, *settings: str) -> Iterator[str]:
    """Serve a model folder; the value is the address, without a path."""
    port = free_port()
    # The command `vllm` of vllm-cpu looks for a distribution called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "16"]
    command += ["--max-num-batched-tokens", str(BATCHED_TOKENS), "--generation-config", "vllm"]
    command += ["--logprobs-mode", "processed_logprobs", *settings]
    address = f"http://127.0.0.1:{port}"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment()) as server,
    ):
        try:
            wait_until_healthy(server, address, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_healthy(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    """Wait until a server answers; raise RuntimeError with its last lines where it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    last = log.read_text(encoding="utf-8")[-4000:]
    raise RuntimeError(f"vLLM did not start in {START_SECONDS} s (exit {server.poll()}):\n{last}")


GRPO_STEPS, LARGEST_GAP = 3, 1e-4


def grpo_settings(run: Path, samples: Path) -> list[str]:
    """Settings of a small `r1v3 grpo` of the demo's base model, whose every step is a large one."""
    return [
        *(f"run={run}", "processes=1", "threads=1", f"model={MODEL}", f"steps={GRPO_STEPS}"),
        *(f"train_data={samples}", f"validation_data={samples}", "prompts_per_step=4"),
        *("group_size=8", "micro_batch_prompts=4", "decoding.max_tokens=48", "validate_every=3"),
        *("optimizer.learning_rate=1e-3", "optimizer.warmup_ratio=0", "checkpoint_every=3"),
    ]


def assert_grpo_trained(run: Path) -> None:
    """Hold every step of a run against what it must be: a gradient, and sampler and trainer one."""
    lines = (run / "metrics" / "grpo.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "rollout_gap" in line]
    assert [line["step"] for line in steps] == list(range(1, GRPO_STEPS + 1))
    assert all(line["grad_norm"] > 0 for line in steps), steps
    gaps = [line["rollout_gap"] for line in steps]
    assert max(gaps) < LARGEST_GAP, gaps
