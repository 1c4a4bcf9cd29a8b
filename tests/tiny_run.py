"""A tiny run through the real verbs, as processes that can be killed at any file operation.

`home()` holds a base model of width 32 that the real `r1v3 data` and `r1v3 sft` made, once for
all test processes. `verb()` runs a verb in a process of its own, forked from a server that has
imported the package already; it can be sent a signal at the n-th change it makes below its folder,
which is where a kill can leave something behind.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples, write_samples
from r1v3.trainer.metrics import comparable, read_metrics
from tests.processes import PATIENCE, made_once

DATA = """
run: run
grpo: 24
grpo_validation: 6
test_in_domain: 6
test_out_of_domain: 4
"""
BASE = """
run: run
threads: 1
architecture:
  vocab_size: 400
  image_size: 32
  patch_size: 8
  rope_theta: 1.0e4
  tokenizer_data: [short/train.parquet]
  vision: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48}
  text:
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    intermediate_size: 64
    max_position_embeddings: 512
train_data: short/train.parquet
validation_data: short/validation.parquet
epochs: 24
batch_size: 32
micro_batch_size: 32
monitor: {words: [Wait]}
optimizer: {learning_rate: 6.0e-3, betas: [0.9, 0.98]}
validate_every: 72
checkpoint_every: 72
"""
SUPERVISED = """
run: run
threads: 1
model: MODEL
train_data: HOME/short/train.parquet
validation_data: HOME/short/validation.parquet
epochs: 1
batch_size: 16
micro_batch_size: 8
monitor: {words: [Wait]}
optimizer: {learning_rate: 1.0e-3}
validate_every: 2
checkpoint_every: 2
early_stopping: 4
"""
GRPO = """
run: run
threads: 1
model: "{run}/models/sft"
train_data: HOME/run/data/grpo.parquet
validation_data: HOME/run/data/grpo_validation.parquet
steps: 4
prompts_per_step: 4
group_size: 4
micro_batch_prompts: 2
decoding: {max_tokens: 24}
measure_all: true
monitor: {words: [Wait]}
optimizer: {learning_rate: 1.0e-3, schedule: constant}
validate_every: 2
checkpoint_every: 2
"""
EVALUATE = """
run: run
threads: 1
model: "{run}/models/grpo"
data: ["{run}/data/test_in_domain.parquet", "{run}/data/test_out_of_domain.parquet"]
out_of_domain: [counting]
budgets: [6]
samples: 2
decoding: {max_tokens: 24}
batch_prompts: 8
transcripts: 2
monitor: {words: [Wait]}
"""
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
PRELOADED = ["r1v3.cli", "r1v3.demo", "r1v3.evaluation.generate", "torch.utils.tensorboard"]


@dataclass(frozen=True)
class Outcome:
    """End of a verb: exit code (minus the signal that killed it), all it printed, and the
    paths it changed, in order."""

    code: int
    output: str
    changes: list[str]

    def error(self) -> str:
        """The one error line of a verb that refused; fails if there was a traceback or more."""
        assert self.code == 1, self
        assert "Traceback" not in self.output, self.output
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.output
        return lines[0]


def _watch(log: str, at: int | None, number: int) -> None:
    """Log every change below the working folder; send signal `number` at the `at`-th."""
    root, count = os.getcwd(), 0
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in CHANGES:
            return
        path = arguments[0]
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        # TensorBoard writes from a thread of its own, at moments that differ from run to run.
        if not isinstance(path, str) or "tensorboard" in path:
            return
        if os.path.isabs(path) and not path.startswith(root):
            return
        count += 1
        os.write(file, f"{path}\n".encode())
        if count == at:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _child(
    arguments: list[str], folder: str, out: str, at: int | None, number: int, limit: int | None
) -> None:
    os.chdir(folder)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    torch.set_num_threads(1)
    # A test run in the background of a shell has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from r1v3.cli import app

    _watch(f"{out}.changes", at, number)
    app(args=arguments, prog_name="r1v3")


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def verb(
    folder: Path,
    *arguments: str,
    at: int | None = None,
    number: int = signal.SIGKILL,
    limit: int | None = None,
) -> Outcome:
    """Run `r1v3 <arguments>` in `folder` and wait for it.

    at: send `number` when it makes its at-th change. limit: most bytes of a file it may write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as private:
        out = f"{private}/out"
        process = _server().Process(
            target=_child, args=(list(arguments), str(folder), out, at, int(number), limit)
        )
        process.start()
        process.join(PATIENCE)
        assert process.exitcode is not None, f"r1v3 {arguments} did not end"
        changes = Path(f"{out}.changes")
        return Outcome(
            process.exitcode,
            Path(out).read_text(encoding="utf-8"),
            changes.read_text(encoding="utf-8").splitlines() if changes.exists() else [],
        )


def succeed(folder: Path, *arguments: str) -> Outcome:
    """`verb`, which must end well."""
    outcome = verb(folder, *arguments)
    assert outcome.code == 0, outcome.output
    return outcome


def short(sample: Sample, index: int) -> Sample:
    """A sample with a response of a dozen tokens in the thinking template."""
    thought = "Wait, so" if index % 3 == 0 else "So"
    answer = sample.ground_truth
    response = f"{thought} {answer}.\n</think>\n\n\\boxed{{{answer}}}"
    return sample.model_copy(update={"extra_info": {**sample.extra_info, "response": response}})


@functools.cache
def home() -> Path:
    """A folder with `run/data`, the short responses in `short/`, and the model folder `base/`."""
    return made_once("tiny", _make_home)[0]


def _make_home(folder: Path) -> None:
    (folder / "data.yaml").write_text(DATA)
    (folder / "base.yaml").write_text(BASE)
    succeed(folder, "data", "data.yaml", "grpo=96", "grpo_validation=12")
    for name, source in (("train", "grpo"), ("validation", "grpo_validation")):
        samples = load_samples(folder / f"run/data/{source}.parquet")
        shortened = [short(sample, index) for index, sample in enumerate(samples)]
        write_samples(folder / f"short/{name}.parquet", shortened)
    succeed(folder, "sft", "base.yaml")
    (folder / "run/models/sft").rename(folder / "base")


def with_positions(folder: Path, positions: int) -> Path:
    """A copy of the base model whose language model has so many positions."""
    shutil.copytree(home() / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_configs(folder: Path) -> Path:
    """The tiny configuration files of every stage, in `folder/configs`."""
    configs = folder / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    texts = {
        "data": DATA,
        "sft": SUPERVISED.replace("MODEL", "HOME/base"),
        "grpo": GRPO,
        "connector": SUPERVISED.replace("MODEL", '"{run}/models/grpo"'),
        "select": "run: run\n",
        "eval": EVALUATE,
    }
    for name, text in texts.items():
        (configs / f"{name}.yaml").write_text(text.replace("HOME", str(home())))
    return configs


def stage_arguments(stage: str) -> list[str]:
    """The command line of one stage alone, from the base model."""
    return [stage, f"configs/{stage}.yaml", f"model={home() / 'base'}"]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def result(run: Path, stage: str) -> dict[str, Any]:
    """Results on which two runs of a stage must agree, bit for bit."""
    checkpoints = sorted((run / "checkpoints" / stage).glob("step-*"))
    return {
        "metrics": comparable(read_metrics(run / "metrics" / f"{stage}.jsonl")),
        "weights": digest(run / "models" / stage / "model.safetensors"),
        "checkpoints": [path.name for path in checkpoints],
        "optimizer": digest(checkpoints[-1] / "trainer.safetensors"),
    }


def leftovers(run: Path) -> list[Path]:
    """Unfinished models and checkpoints below a run."""
    return [path for path in run.rglob(".*.tmp") if path.is_dir()]


@functools.cache
def finished(stage: str) -> tuple[Path, list[str]]:
    """An uninterrupted run of one stage: its working folder and what it changed."""

    def run(folder: Path) -> list[str]:
        write_configs(folder)
        return succeed(folder, *stage_arguments(stage)).changes

    return made_once(f"whole-{stage}", run)


def seeded_moments(stage: str, count: int) -> list[int]:
    """Moments to kill at: `count` anywhere, and one while a checkpoint is being written."""
    _, changes = finished(stage)
    rng = random.Random(stage)
    anywhere = [rng.randrange(1, len(changes)) for _ in range(count)]
    saving = [n for n, path in enumerate(changes, 1) if "/.step-" in path]
    return [*anywhere, rng.choice(saving)]


def go_on(folder: Path, stage: str, *, at: int | None = None, number: int = 9) -> Outcome:
    """Start or resume a stage, as a person would after looking into the folder."""
    begun = (folder / "run/config" / f"{stage}.yaml").exists()
    flags = ["--resume"] if begun else []
    return verb(folder, *stage_arguments(stage), *flags, at=at, number=number)


def check_kills(folder: Path, stage: str, moments: list[int]) -> None:
    """Kill a stage at each moment in turn; in the end it must be what no kill would have left."""
    whole, _ = finished(stage)
    write_configs(folder)
    for moment in moments:
        killed = go_on(folder, stage, at=moment)
        # A resumed run may have fewer changes left than the moment counts.
        assert killed.code in (0, -signal.SIGKILL), killed.output
    last = go_on(folder, stage)
    assert last.code == 0, last.output
    assert result(folder / "run", stage) == result(whole / "run", stage)
    assert leftovers(folder / "run") == [], leftovers(folder / "run")
