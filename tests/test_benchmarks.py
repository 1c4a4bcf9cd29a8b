"""The benchmark harness: what it refuses, what it measures and what it writes."""

import gc
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gate, machine, peers, report, runner, session, timing
from benchmarks.__main__ import main, parse
from benchmarks.ops import OPS
from benchmarks.problem import Function, Mode, Problem

TINY = {
    **dict.fromkeys(("logprobs_and_entropy", "selective_log_softmax"), {"T": 5, "V": 300}),
    "group_advantages": {"N": 64},
    "grpo_loss": {"B": 6, "T": 8},
    "ban_tokens": {"T": 5, "V": 300, "K": 7},
    "sample_tokens": {"T": 5, "V": 300, "K": 7},
    "linear_logprobs_and_entropy": {"T": 5, "H": 16, "V": 300},
    "linear_cross_entropy": {"T": 5, "H": 16, "V": 300},
    "logits_grpo_loss": {"T": 4, "V": 300},
    "selected_rows": {"T": 6, "V": 300, "n": 2},
    **dict.fromkeys(("entropy", "tempered", "in_place", "vocabulary_shard"), {"T": 5, "V": 300}),
    "linear_grpo_loss": {"B": 2, "T": 4, "H": 16, "V": 300},
}
CASES = [(op, mode) for op, module in OPS.items() for mode in module.MODES]


def tiny(op: str, mode: Mode) -> Problem:
    return OPS[op].problem(TINY[op], mode, "cpu")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives the function itself: compiling takes longer than all tests here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    """Small problems, each timed as few times as is allowed."""
    monkeypatch.setitem(session.SECONDS_PER_TASK, "small", 0.0)
    for op, module in OPS.items():
        monkeypatch.setattr(module, "shapes", lambda device, size, op=op: [TINY[op]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["entropi"], "unknown op 'entropi'; did you mean entropy?"),
        (["--peers", "tlr"], "unknown peer 'tlr'; did you mean trl?"),
        (["qqqq"], "known: logprobs_and_entropy"),
        (["--shapes", "huge"], "invalid choice: 'huge'"),
        (["--json", "."], "is a directory"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mistyped option is ignored, or ends in a traceback after minutes of work."""
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if --device cuda falls back to the CPU and its times are taken for a GPU's."""
    with pytest.raises(SystemExit):
        parse(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("op", "mode"), CASES)
def test_kernels_and_eager_pass_the_gate(op: str, mode: Mode) -> None:
    """Fails if a benchmark calls something that is not the op, or gates on a wrong truth."""
    problem = tiny(op, mode)
    truth = gate.solve(problem)
    functions = {runner.OURS: problem.ours, runner.EAGER: problem.eager, **problem.restated}
    for name, function in functions.items():
        result = runner.check(problem, name, function, truth, "cpu")
        assert (result.status, result.note) == ("timed", "")
        assert result.error is not None and result.error < 0.1


def off_by(amount: float, row: int) -> Any:
    def wrong(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = tiny("logprobs_and_entropy", "forward").ours(
            logits=logits, token_ids=token_ids
        )
        offset = torch.zeros_like(entropy)
        offset[row] = amount
        return logprobs, entropy + offset

    return wrong


@pytest.mark.parametrize("amount", [1e-3, -1e-3, math.nan, math.inf])
@pytest.mark.parametrize("row", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_gate_refuses_one_wrong_row(amount: float, row: int, no_compiler: None) -> None:
    """Fails if a kernel that is wrong in one row, or gives NaN, gets a time."""
    problem = replace(tiny("logprobs_and_entropy", "forward"), ours=off_by(amount, row))
    done = runner.run(problem, {}, "cpu", 0.0)
    result = done.results[0]
    assert (result.implementation, result.status) == (runner.OURS, "refused")
    assert result.timing is None and "output 1" in result.note
    assert not done.sound


def test_gate_refuses_a_wrong_gradient() -> None:
    """Fails if only outputs are compared: a kernel with a broken backward would get a time."""
    problem = tiny("logprobs_and_entropy", "backward")

    def detached(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = problem.ours(logits=logits, token_ids=token_ids)
        return logprobs, entropy.detach() + 0 * logprobs

    result = runner.check(problem, runner.OURS, detached, gate.solve(problem), "cpu")
    assert result.status == "refused" and "logits" in result.note


def test_gate_refuses_a_wrong_weight_gradient() -> None:
    """Fails if the gradient that all rows share is compared on some rows' part only."""
    problem = tiny("linear_logprobs_and_entropy", "backward")

    def last_row_detached(
        hidden: Tensor, weight: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = [
            problem.reference(hidden=hidden[:-1], weight=weight, token_ids=token_ids[:-1]),
            problem.reference(hidden=hidden[-1:], weight=weight.detach(), token_ids=token_ids[-1:]),
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    result = runner.check(problem, runner.OURS, last_row_detached, gate.solve(problem), "cpu")
    assert result.status == "refused" and "weight" in result.note


def test_truth_in_parts_is_the_truth_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if cutting a large problem into rows loses a row or a share of the weight gradient."""
    problem = tiny("linear_logprobs_and_entropy", "backward")
    at_once = gate.solve(problem).answer
    monkeypatch.setattr(gate, "CHUNK_ELEMENTS", 2 * problem.shape["V"])
    in_parts = gate.solve(problem).answer
    for a, b in zip(at_once.outputs, in_parts.outputs, strict=True):
        torch.testing.assert_close(a, b)
    for name in problem.differentiated:
        assert in_parts.gradients[name].dtype == torch.float64
        torch.testing.assert_close(at_once.gradients[name], in_parts.gradients[name])


def test_a_gradient_that_rows_share_is_summed_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if the truth of thousands of rows keeps a whole weight's gradient for each part."""
    problem = tiny("linear_logprobs_and_entropy", "backward")
    monkeypatch.setattr(gate, "CHUNK_ELEMENTS", problem.shape["V"])
    given: list[weakref.ref[Tensor]] = []
    most, answer = 0, gate.answer

    def watched(part: Problem, function: Function) -> gate.Answer:
        nonlocal most
        most = max(most, sum(gradient() is not None for gradient in given))
        found = answer(part, function)
        given.append(weakref.ref(found.gradients["weight"]))
        return found

    monkeypatch.setattr(gate, "answer", watched)
    gate.solve(problem)
    assert len(given) == 2 * problem.shape["T"]
    assert most <= 3


def test_many_rows_are_sampled_with_first_and_last() -> None:
    """Fails if the last rows, where an index overflow shows first, are never compared."""
    problem = OPS["logprobs_and_entropy"].problem({"T": 200, "V": 10}, "backward", "cpu")
    rows = gate.solve(problem).rows
    assert rows is not None
    assert rows[0] == 0 and rows[-1] == 199 and len(rows) == gate.GRADIENT_ROWS


def test_rivals_failures_are_their_own(no_compiler: None) -> None:
    """Fails if a rival that is wrong or raises gets a time, or spoils the others' results."""
    problem = tiny("entropy", "forward")

    def broken(logits: Tensor) -> tuple[Tensor]:
        raise RuntimeError("no kernel image\nmore lines")

    rivals: dict[str, Function] = {
        "wrong": lambda logits: (torch.zeros(logits.shape[0]),),
        "broken": broken,
        "misshapen": lambda logits: (torch.zeros(1),),
    }
    done = runner.run(problem, rivals, "cpu", 0.0)
    results = {result.implementation: result for result in done.results}
    assert done.sound and results[runner.EAGER].timing is not None
    assert results["wrong"].status == "refused" and results["wrong"].timing is None
    assert results["broken"].note == "RuntimeError: no kernel image"
    assert results["misshapen"].status == "failed"


def test_a_wrong_kernel_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tiny_shapes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a script that runs the benchmarks cannot see that a kernel is wrong."""
    right = OPS["entropy"].problem
    monkeypatch.setattr(
        OPS["entropy"],
        "problem",
        lambda *a: replace(right(*a), ours=lambda logits: (logits[:, 0].float(),)),
    )
    assert main(["entropy", "--device", "cpu", "--peers"]) == 1
    assert "r1v3 refused: wrong" in capsys.readouterr().out


def test_results_are_in_the_file_after_every_problem(
    monkeypatch: pytest.MonkeyPatch, tiny_shapes: None, tmp_path: Path
) -> None:
    """Fails if a run that runs out of memory, or is ended, loses what it has measured."""
    right, target = OPS["entropy"].problem, tmp_path / "results.json"

    def hostile(shape: dict[str, int], mode: Mode, device: str) -> Problem:
        if shape["T"] == 1:
            raise torch.OutOfMemoryError("434 GiB\nare not there")
        if shape["T"] == 2:
            raise KeyboardInterrupt
        return right(shape, mode, device)

    shapes = [{"T": rows, "V": 300} for rows in (3, 1, 4, 2, 5)]
    monkeypatch.setattr(OPS["entropy"], "problem", hostile)
    monkeypatch.setattr(OPS["entropy"], "shapes", lambda device, size: shapes)
    arguments = ["entropy", "--device", "cpu", "--peers", "--no-compile", "--json", str(target)]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    data = json.loads(target.read_text())
    assert [problem["shape"]["T"] for problem in data["problems"]] == [3, 4]
    assert [(x["shape"]["T"], x["error"]) for x in data["failed"]] == [
        (1, "OutOfMemoryError: 434 GiB")
    ]
    named = [i["implementation"] for i in data["problems"][0]["implementations"]]
    assert named == [runner.OURS, runner.EAGER]
    shapes[3:] = []
    assert main(arguments) == 1


def test_problems_without_time_are_named(
    monkeypatch: pytest.MonkeyPatch,
    tiny_shapes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a run goes on past its seconds, or hides what it has left out."""
    target = tmp_path / "results.json"
    monkeypatch.setattr(session.time, "perf_counter", iter(range(0, 10**6, 50)).__next__)
    arguments = ["grpo_loss", "entropy", "ban_tokens", "--device", "cpu", "--peers", "--seconds"]
    assert main([*arguments, "60", "--json", str(target)]) == 0
    data = json.loads(target.read_text())
    assert [problem["op"] for problem in data["problems"]] == ["grpo_loss"]
    assert [x["op"] for x in data["skipped"]] == ["entropy", "ban_tokens"]
    assert "no time for 2 more" in capsys.readouterr().out


def test_what_is_kept_of_a_problem_holds_no_inputs(no_compiler: None) -> None:
    """Fails if the logits of every problem of a run stay in the device's memory."""
    problem = tiny("entropy", "forward")
    logits = weakref.ref(problem.inputs["logits"])
    done = runner.run(problem, {}, "cpu", 0.0)
    del problem
    gc.collect()
    assert done.sound and logits() is None


def test_banning_leaves_the_inputs_of_the_next(no_compiler: None) -> None:
    """Fails if an in-place op does the work of those checked after it."""
    problem = tiny("ban_tokens", "forward")
    truth = gate.solve(problem)
    gate.answer(problem, problem.ours)
    assert torch.isfinite(problem.inputs["logits"]).all()
    idle = runner.check(problem, runner.OURS, lambda logits, token_ids: (logits,), truth, "cpu")
    assert idle.status == "refused"


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantiles_are_numpys(n: int, q: float) -> None:
    """Fails if median or percentiles are off by one sample."""
    values = np.sort(np.random.default_rng(n).exponential(size=n))
    assert timing.quantile(list(values), q) == pytest.approx(np.quantile(values, q))


def test_a_timing_without_samples_is_an_error() -> None:
    """Fails if nothing measured becomes a number."""
    with pytest.raises(ValueError, match="at least one sample"):
        timing.Timing.of([])


class Clock:
    """Time that only the tasks pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def task(self, name: str, seconds: Iterator[float], preparation: float = 0.0) -> timing.Task:
        def run(prepared: object) -> None:
            assert prepared == ("ready" if preparation else None)
            self.order.append(name)
            self.now += next(seconds)

        def prepare() -> str:
            self.now += preparation
            return "ready"

        return timing.Task(name, run, prepare if preparation else None)


def cycle(*values: float) -> Iterator[float]:
    while True:
        yield from values


def test_measured_times_are_those_of_run_alone() -> None:
    """Fails if preparation, the other tasks or the repeats within a sample enter a time."""
    clock = Clock()
    tasks = [
        clock.task("slow", cycle(2.0, 4.0, 3.0), preparation=10.0),
        clock.task("fast", cycle(0.25)),
        clock.task("tiny", cycle(1e-5)),
    ]
    timings = timing.measure(tasks, "cpu", 50.0, clock)
    assert timings["slow"].median == pytest.approx(3.0)
    assert timings["slow"].p20 < 3.0 < timings["slow"].p80
    assert timings["fast"].median == pytest.approx(0.25)
    assert timings["tiny"].median == pytest.approx(1e-5)
    assert timings["tiny"].calls_per_sample in (100, 101)
    assert timings["fast"].calls_per_sample == 1
    assert len({t.samples for t in timings.values()}) == 1


def test_tasks_take_turns() -> None:
    """Fails if one implementation is timed in a quiet minute and the other in a busy one.

    Or if one always follows the same other, whose leftovers in the caches then count for it.
    """
    clock = Clock()
    tasks = [clock.task(name, cycle(1.0)) for name in "abc"]
    timing.measure(tasks, "cpu", 0.0, clock)
    turns = ["".join(clock.order[i : i + 3]) for i in range(3, len(clock.order), 3)]
    assert len(turns) == timing.CPU_FEWEST_ROUNDS
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({turn[turn.index("a") - 1] for turn in turns if turn[0] != "a"}) > 1


def test_peak_memory_is_the_most_alive_at_once() -> None:
    """Fails if freed tensors stay counted, or what a run keeps is missed."""

    def run(held: Tensor) -> Tensor:
        first = torch.empty(2**20)
        del first
        return torch.empty(2**19) if held.numel() else held

    task = timing.Task("x", run, lambda: torch.empty(2**18))
    peak = timing.peak_extra_bytes(task, "cpu")
    assert peak == pytest.approx(4 * (2**18 + 2**20), abs=4096)


def test_absent_rivals_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rival that is not there, or cannot be imported, vanishes from the report."""
    known = tuple(
        peers.Peer(project, "entropy", module, lambda module: module.missing, cuda_only=gpu)
        for project, module, gpu in (
            ("gone", "no_such_module_anywhere.x", False),
            ("broken", "json", False),
            ("gpu", "json", True),
        )
    )
    monkeypatch.setattr(peers, "PEERS", known)
    found, absent = peers.find("entropy", "forward", "cpu", ["gone", "broken", "gpu"])
    assert found == {}
    assert absent["gone"] == "not installed" and absent["gpu"] == "needs a GPU"
    assert absent["broken"].startswith("cannot be imported: AttributeError")
    assert peers.find("entropy", "forward", "cpu", []) == ({}, {})
    assert peers.find("entropy", "backward", "cpu", ["gone"]) == ({}, {})


def test_every_peer_belongs_to_an_op_and_mode() -> None:
    """Fails if a rival is filed under a name that no benchmark asks for."""
    assert all((peer.op, mode) in CASES for peer in peers.PEERS for mode in peer.modes)


def test_bitmask_bits() -> None:
    """Fails if the mask handed to xgrammar bans other tokens than ours."""
    mask = peers._bitmask(torch.tensor([0, 31, 33, 69]), 70)
    bits = [(int(mask[0, i // 32]) >> (i % 32)) & 1 for i in range(70)]
    assert mask.dtype == torch.int32 and mask.shape == (1, 3)
    assert [i for i, bit in enumerate(bits) if not bit] == [0, 31, 33, 69]


def test_transformers_agrees() -> None:
    """Fails if the rival installed with r1v3 is called with other arguments than it takes."""
    problem = tiny("ban_tokens", "forward")
    found, _ = peers.find("ban_tokens", "forward", "cpu", ["transformers"])
    result = runner.check(
        problem, "transformers", found["transformers"], gate.solve(problem), "cpu"
    )
    assert (result.status, result.error) == ("timed", 0.0)


def test_document_and_figures(
    tiny_shapes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the layout that programs read changes without a new schema number."""
    target, figures = tmp_path / "new" / "results.json", tmp_path / "figures"
    status = main(
        ["logprobs_and_entropy", "grpo_loss", "linear_logprobs_and_entropy", "--device", "cpu",
         "--peers", "trl", "--json", str(target), "--plot", str(figures)]
    )  # fmt: skip
    assert status == 0
    data = json.loads(target.read_text())
    assert data["schema"] == session.SCHEMA == 1
    assert {"date", "commit", "dirty", "cpu", "torch", "torch_threads"} <= set(data["header"])
    modes = [(p["op"], p["mode"]) for p in data["problems"]]
    assert modes == [case for case in CASES if case[0] in TINY and case in modes]
    assert len(modes) == 6
    for problem in data["problems"]:
        check_problem(problem)
    for op in ("logprobs_and_entropy", "grpo_loss", "linear_logprobs_and_entropy"):
        assert (figures / f"{op}.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]
    assert "x compile" in capsys.readouterr().out


def check_problem(problem: dict[str, Any]) -> None:
    assert {"shape", "dtype", "bytes", "flops", "yardstick", "absent"} <= set(problem)
    ours, eager, compiled = problem["implementations"][:3]
    assert ours["implementation"] == "r1v3" and ours["status"] == "timed"
    assert {f for f in ours if ours[f] is None} <= {"gigaflops_per_second", "gigabytes_per_second"}
    assert 0 < ours["timing"]["p20"] <= ours["timing"]["median"] <= ours["timing"]["p80"]
    assert eager["over_eager"] == 1.0 and compiled["over_compile"] == 1.0
    ratio = eager["timing"]["median"] / ours["timing"]["median"]
    assert ours["over_eager"] == pytest.approx(ratio)
    best = problem["yardstick_timing"]["median"] / ours["timing"]["median"]
    products = {"forward": 1, "backward": 2, "forward+backward": 3}
    factor = products[problem["mode"]] if problem["flops"] else 1
    assert ours["percent_of_yardstick"] == pytest.approx(100 * factor * best)


def test_warnings_name_what_spoils_times() -> None:
    """Fails if times from a busy machine or an unknown commit look like any others."""
    facts = {
        "dirty": True, "commit": "unknown", "load_average": 3.0, "cores": 2,
        "cpu_kernels": "not built", "device": "cpu",
    }  # fmt: skip
    assert len(machine.warnings(facts)) == 4
    quiet = {**facts, "dirty": False, "commit": "a" * 40, "load_average": 0.1}
    assert machine.warnings({**quiet, "cpu_kernels": "avx2"}) == []


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a result from a machine that got no repository cannot be traced to its code."""
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for given, found in (
        (commit, (commit, False)),
        (f"{commit}-dirty", (commit, True)),
        (None, ("unknown", True)),
    ):
        facts = machine.header("cpu", given)
        assert (facts["commit"], facts["dirty"]) == found
    assert parse(["--commit", commit]).commit == commit


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.5 s"),
        (0.00123, "1.23 ms"),
        (4.56e-6, "4.56 us"),
        (1e-9, "0.001 us"),
        (1234, "1234 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Fails if a unit is wrong by a factor of a thousand."""
    assert report.duration(seconds) == text
