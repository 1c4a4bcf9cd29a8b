"""The benchmarks on a GPU, as far as that can be seen without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_linear_logprobs_and_entropy,
    compilations,
    gate,
    peers,
    runner,
    timing,
)
from benchmarks.ops import OPS


class FakeDevice:
    """A stream that begins what it is given a head start later, on clocks that only tasks move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.device = self.host = 0.0
        self.head_starts: list[int] = []
        make = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, device, **k: make(1, **k))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.head_starts.append(cycles)
        self.device = max(self.device, self.host) + cycles * 0.5e-9

    def work(self, host: float, device: float) -> None:
        """A call that takes the host so long to enqueue and the device so long to run."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        device = self

        class Event:
            def record(self) -> None:
                device.log.append("record")
                self.at = device.device

            def query(self) -> bool:
                return device.host > self.at

            def synchronize(self) -> None:
                device.log.append("synchronize")
                device.host = max(device.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        return Event()


def test_cuda_times_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the flush, the head start or the preparation is timed, or warm-up is counted."""
    fake = FakeDevice(monkeypatch)

    def run(prepared: object) -> None:
        assert prepared == "ready"
        fake.log.append("run")
        fake.work(host=1e-6, device=3e-6)

    def prepare() -> str:
        fake.log.append("prepare")
        fake.work(host=0.5, device=1.0)
        return "ready"

    timings = timing.measure([timing.Task("x", run, prepare)], "cuda", 1e9)
    assert timings["x"].samples == timing.CUDA_ROUNDS
    assert timings["x"].median == pytest.approx(3e-6)
    assert timings["x"].late == 0
    assert fake.log[:6] == ["prepare", "sleep", "record", "run", "record", "synchronize"]


def test_a_call_that_is_long_to_enqueue_is_not_timed_by_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if the host's 3 ms of enqueueing thirty kernels are reported as the device's 0.2 ms."""
    fake = FakeDevice(monkeypatch)
    tasks = [
        timing.Task("many kernels", lambda _: [fake.work(1e-4, 7e-6) for _ in range(30)]),
        timing.Task("one kernel", lambda _: fake.work(1e-5, 7e-6)),
    ]
    timings = timing.measure(tasks, "cuda", 1e9)
    assert timings["many kernels"].median == pytest.approx(30 * 7e-6)
    assert timings["many kernels"].late == timings["one kernel"].late == 0
    assert timings["one kernel"].median == pytest.approx(7e-6)
    assert fake.head_starts[-1] == timing.CUDA_HEAD_START < fake.head_starts[-2]


def test_a_call_that_waits_for_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if times that hold the host's are not told from the device's own."""
    fake = FakeDevice(monkeypatch)

    def waits(_: object) -> None:
        fake.host = max(fake.host, fake.device) + 1e-3
        fake.work(1e-4, 7e-6)

    timings = timing.measure([timing.Task("x", waits)], "cuda", 1e9)
    assert timings["x"].late == timings["x"].samples
    assert max(fake.head_starts) <= timing.CUDA_LONGEST_HEAD_START


def test_cuda_rounds_end_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if five slow implementations take minutes of a device's time, whatever was asked."""
    fake = FakeDevice(monkeypatch)
    tasks = [timing.Task("slow", lambda _: fake.work(1e-5, 0.5))]
    timings = timing.measure(tasks, "cuda", 8.0, clock=lambda: fake.device)
    assert timings["slow"].samples == 0.75 * 8.0 / 0.5
    assert timing.measure(tasks, "cuda", 0.0, clock=lambda: fake.device)["slow"].samples == 10


def test_overwritten_inputs_are_fresh_in_every_cuda_run() -> None:
    """Fails if an op in place is timed on what an earlier run left."""
    problem = OPS["in_place"].problem({"T": 5, "V": 300}, "backward", "cpu")
    task = runner._task(problem, runner.OURS, problem.ours, "cuda")
    assert task.prepare is not None
    kept = problem.inputs["logits"].clone()
    first, second = (task.run(task.prepare()) for _ in range(2))
    assert torch.equal(first[0], second[0])  # type: ignore[index]
    assert torch.equal(problem.inputs["logits"], kept)


def test_compilations_are_counted_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a recompilation goes uncounted, or the hook outlives the count."""
    knobs = pytest.importorskip("triton.knobs")
    before = knobs.runtime.jit_post_compile_hook

    def step(length: int, temperature: float, device: str) -> None:
        if temperature == 1.0:
            knobs.runtime.jit_post_compile_hook(key="k", fn=SimpleNamespace(name="rows"))

    monkeypatch.setattr(compilations, "_step", step)
    assert compilations.count("cuda") == {"rows": len(compilations.LENGTHS)}
    assert knobs.runtime.jit_post_compile_hook is before
    assert compilations.count("cpu") == {}


def test_one_row_more_costs_no_copy() -> None:
    """Fails if the rival that wants an extra row is differentiated by other rows than ours."""
    logits = torch.randn(6, 7)[:5].requires_grad_()
    weights = torch.randn(5, 7)
    loss = peers._WithOneRowMore.apply(logits, lambda x: (x[0, :-1] * weights).sum() * 2)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(gradient, 6 * weights)


def test_the_loss_of_sampled_rows_is_that_of_all() -> None:
    """Fails if a batch too large to be compared in full is compared with another batch's loss."""
    problem = OPS["logits_grpo_loss"].problem({"T": 256, "V": 40}, "forward+backward", "cpu")
    truth = gate.solve(problem)
    assert truth.rows is not None and len(truth.rows) < 256
    functions = {runner.OURS: problem.ours, runner.EAGER: problem.eager, **problem.restated}
    for name, function in functions.items():
        result = runner.check(problem, name, function, truth, "cpu")
        assert (result.status, result.note) == ("timed", ""), name


@pytest.mark.parametrize("cuda,size,error", [(True, 2, 1e-4), (True, 4, 0.0), (False, 2, 0.0)])
def test_products_in_tensor_cores_may_be_less_exact(cuda: bool, size: int, error: float) -> None:
    """Fails if r1v3 is refused for what tensor cores cut off, or excused where none are used."""
    hidden: Any = SimpleNamespace(is_cuda=cuda, element_size=lambda: size)
    tolerance = bench_linear_logprobs_and_entropy.product_tolerance(hidden)
    truth = gate.Truth(gate.Answer((torch.zeros(3),), {}), None, {"output 0": 1e-6})
    given = gate.Answer((torch.zeros(3),), {})
    for off, allowed in ((error, True), (error + 1.5e-4, False)):
        objection = gate.objection({"output 0": off}, truth, given, tolerance, is_ours=True)
        assert (objection is None) == allowed
