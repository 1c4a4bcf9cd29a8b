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
    needs: tuple[str, ...] = ()

    def seconds(self, left: float, planned_from_here: float) -> float:
        """Its part of the seconds that are left, for a command that can do more or less."""
        return min(left * self.planned / planned_from_here, 0.8 * self.limit)


def steps(
    device: str,
    parts: Path,
    *,
    arch: str = "90",
    commit: str | None = None,
    rivals: Path | None = None,
    workers: int = 8,
    shapes: str | None = None,
) -> list[Step]:
    """All steps, in their order.

    Args:
        parts: the folder of the steps' results.
        arch: the architecture to build for, as nvcc names it.
        commit: as `machine.header` takes it, or None.
        rivals: a folder with packages that ops and the training step may import, or None.
        workers: processes of the tests.
        shapes: of the ops; None for full ones on a GPU, small ones on a CPU.
    """
    gpu = device != "cpu"
    patience = 1 if gpu else CPU_PATIENCE
    shapes = shapes or ("full" if gpu else "small")
    told = ("--commit", commit) if commit else ()
    path = {"PYTHONPATH": str(rivals)} if rivals is not None and rivals.is_dir() else {}

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return sys.executable, "-m", name, *arguments

    def op(name: str, planned: float, compiled: bool) -> Step:
        result = parts / f"{name}.json"
        options = () if compiled else ("--no-compile",)
        command = module(
            "benchmarks.device.op", name, "--device", device, "--shapes", shapes, "--json",
            str(result), *told, *options, "--seconds",
        )  # fmt: skip
        # A process needs some seconds before its first problem.
        return Step(
            name, command, planned, patience * (2 * planned + 15), result, path, shares_time=True
        )

    def tests() -> Step:
        result = parts / "tests.json"
        chosen = ("--gpu",) if gpu else CPU_TESTS
        command = module(
            "benchmarks.device.tests", *chosen, "--workers", str(workers), "--json", str(result),
            "--seconds",
        )  # fmt: skip
        planned, limit = (150, 220) if gpu else (20, 60 * patience)
        return Step(
            "tests", command, planned, limit, result, shares_time=True, needs=("module pytest",)
        )

    def facts(name: str, planned: float, *options: str) -> Step:
        result = parts / f"{name}.json"
        command = module("benchmarks.device.facts", "--device", device, "--json", str(result),
                         *told, *options)  # fmt: skip
        return Step(name, command, planned, 60 * patience, result)

    build = {"R1V3_BUILD_CUDA": "1", "R1V3_CUDA_ARCHS": arch} if gpu else {"R1V3_BUILD_CUDA": "0"}
    race = parts / "racecheck.json"
    training = parts / "training_step.json"
    everything = [
        facts(MACHINE, 8),
        Step(
            "build",
            (sys.executable, "setup.py", "build_ext", "--inplace"),
            45 if gpu else 70,
            150 * patience,
            environment=build,
            needs=("module setuptools", "module pybind11", *(("program nvcc",) if gpu else ())),
        ),
        facts("probes", 15 if gpu else 6, "--probes"),
        tests(),
    ]
    if gpu:
        everything.append(
            Step(
                "racecheck",
                ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9",
                 *module("benchmarks.device.one_row", "--json", str(race))),
                20,
                60,
                race,
                needs=("program compute-sanitizer",),
            )
        )  # fmt: skip
    everything += [op(name, *how) for name, how in (OPS if gpu else CPU_OPS).items()]
    everything.append(
        Step(
            "training_step",
            module("benchmarks.training_step", "--device", device, "--json", str(training),
                   "--timeout", "150"),
            400 if gpu else 120,
            540 * patience,
            training,
            path,
            on_request=True,
            needs=("module transformers", "module pydantic"),
        )
    )  # fmt: skip
    return everything


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
