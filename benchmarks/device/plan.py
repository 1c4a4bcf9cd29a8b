"""The steps of a run on a device, with the seconds that each is planned and allowed to take."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "machine"
SECONDS = 560.0
# Ops on a GPU: planned seconds, and whether torch.compile, which takes most of them, is a rival.
OPS = {
    "logprobs_and_entropy": (52, True),
    "logits_grpo_loss": (52, True),
    "linear_grpo_loss": (45, False),
    "linear_logprobs_and_entropy": (35, False),
    "grpo_loss": (25, True),
    "sample_tokens": (25, True),
    "linear_cross_entropy": (20, False),
    "entropy": (8, False),
    "selective_log_softmax": (8, False),
    "vocabulary_shard": (8, False),
    "in_place": (6, False),
    "tempered": (5, False),
    "selected_rows": (5, False),
    "group_advantages": (5, False),
    "ban_tokens": (5, False),
}
CPU_OPS = {"grpo_loss": (10, False), "group_advantages": (10, False)}
# On a CPU no time is lent, and a busy one may take long.
CPU_PATIENCE = 40
# Nothing but the CPU's path through the same steps.
CPU_TESTS = ("tests/kernels/test_ban_tokens.py", "tests/kernels/test_group_advantages.py")


@dataclass(frozen=True)
class Step:
    """One step: a command of its own, which ends at the limit.

    Attributes:
        planned, limit: seconds.
        result: the JSON file that the command writes, anew whenever it knows more.
        shares_time: the command is told the seconds that it has, as its last argument.
        on_request: left out unless it is named.
        decides: without it none of the later steps can do anything.
        needs: what must be there, a program on PATH or a module, or the step is absent.
    """

    name: str
    command: tuple[str, ...]
    planned: float
    limit: float
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    shares_time: bool = False
    on_request: bool = False
    decides: bool = False
    needs: tuple[str, ...] = ()

    def seconds(self, left: float, planned_from_here: float) -> float:
        """Its part of the seconds that are left, for a command that can do more or less."""
        return min(left * self.planned / planned_from_here, 0.8 * self.limit)


@dataclass(frozen=True)
class Setting:
    """The choices that the steps of a run depend on.

    Attributes:
        device: "cpu" or "cuda".
        parts: the folder of the steps' results.
        arch: the architecture to build for, as nvcc names it.
        commit: as `machine.header` takes it, or None.
        rivals: a folder with packages that ops and the training step may import.
        workers: processes of the tests.
        shapes: of the ops, "small" or "full".
    """

    device: str
    parts: Path
    arch: str = "90"
    commit: str | None = None
    rivals: Path | None = None
    workers: int = 8
    shapes: str = "full"

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return self.device != "cpu"

    @property
    def patience(self) -> int:
        """The factor of the limits."""
        return 1 if self.gpu else CPU_PATIENCE

    def result(self, name: str) -> Path:
        """The file of a step's results."""
        return self.parts / f"{name}.json"

    def command(
        self, module: str, name: str, *arguments: str, tells: bool = True
    ) -> tuple[str, ...]:
        """A module of this project, told the device and the file of its results."""
        told = ("--commit", self.commit) if self.commit and tells else ()
        return (sys.executable, "-m", module, *arguments, "--device", self.device,
                "--json", str(self.result(name)), *told)  # fmt: skip

    @property
    def path(self) -> dict[str, str]:
        """Environment of steps that import the rivals' packages."""
        there = self.rivals is not None and self.rivals.is_dir()
        return {"PYTHONPATH": str(self.rivals)} if there else {}


def steps(setting: Setting) -> list[Step]:
    """All steps, in their order."""
    gpu = setting.gpu
    first = [_facts(setting, MACHINE, 8), _build(setting)]
    first += [_facts(setting, "probes", 15 if gpu else 6, "--probes"), _tests(setting)]
    ops = OPS if gpu else CPU_OPS
    return [
        *first,
        *([_racecheck(setting)] if gpu else []),
        *(_op(setting, name, planned, compiled) for name, (planned, compiled) in ops.items()),
        _training_step(setting),
    ]


def _facts(setting: Setting, name: str, planned: float, *options: str) -> Step:
    command = setting.command("benchmarks.device.facts", name, *options)
    return Step(
        name, command, planned, 60 * setting.patience, setting.result(name),
        decides=name == MACHINE,
    )  # fmt: skip


def _build(setting: Setting) -> Step:
    command = (sys.executable, "-m", "benchmarks.device.build")
    needs: tuple[str, ...] = ("module setuptools", "module pybind11")
    if setting.gpu:
        command, needs = (*command, "--arch", setting.arch), (*needs, "program nvcc")
    planned, limit = 45 if setting.gpu else 70, 150 * setting.patience
    return Step("build", command, planned, limit, needs=needs)


def _tests(setting: Setting) -> Step:
    chosen = ("--gpu",) if setting.gpu else CPU_TESTS
    module = (sys.executable, "-m", "benchmarks.device.tests", *chosen)
    told = ("--workers", str(setting.workers), "--json", str(setting.result("tests")))
    planned, limit = (150, 220) if setting.gpu else (20, 60 * setting.patience)
    return Step(
        "tests", (*module, *told, "--seconds"), planned, limit, setting.result("tests"),
        shares_time=True, needs=("module pytest",),
    )  # fmt: skip


def _racecheck(setting: Setting) -> Step:
    result = setting.result("racecheck")
    row = (sys.executable, "-m", "benchmarks.device.one_row", "--json", str(result))
    command = ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *row)
    return Step("racecheck", command, 20, 60, result, needs=("program compute-sanitizer",))


def _op(setting: Setting, name: str, planned: float, compiled: bool) -> Step:
    options = () if compiled else ("--no-compile",)
    command = setting.command(
        "benchmarks.device.op", name, name, "--shapes", setting.shapes, *options
    )
    # A process needs some seconds before its first problem.
    limit = setting.patience * (2 * planned + 15)
    return Step(
        name, (*command, "--seconds"), planned, limit, setting.result(name), setting.path,
        shares_time=True,
    )  # fmt: skip


def _training_step(setting: Setting) -> Step:
    name, planned = "training_step", 400 if setting.gpu else 120
    command = setting.command("benchmarks.training_step", name, "--timeout", "150", tells=False)
    return Step(
        name, command, planned, 540 * setting.patience, setting.result(name), setting.path,
        on_request=True, needs=("module transformers", "module pydantic"),
    )  # fmt: skip


def chosen(everything: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps of these names, after the machine's facts; without names all but those on request.

    Raises:
        ValueError: for a name that no step has.
    """
    known = [step.name for step in everything]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown step {name!r}; known: {', '.join(known)}")
    return [
        step
        for step in everything
        if step.name == MACHINE or (step.name in names if names else not step.on_request)
    ]
