"""Where ops take their memory, and that on a GPU they stay on their stream and wait for nothing."""
# mypy: disable-error-code="arg-type,union-attr,index"

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    ban_tokens_,
    entropy_from_logits,
    group_advantages,
    grpo_loss,
    linear_logprobs_and_entropy,
    logits_grpo_loss,
    logprobs_and_entropy,
    sample_tokens,
    selective_log_softmax,
)
from tests.kernels.conftest import INTERPRETED

Step = Callable[[Tensor], list[Tensor]]
ROWS, VOCAB = 6, 4500


def with_gradient(x: Tensor, function: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    outputs = function(leaf)
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in outputs), leaf)
    return [*(value.detach() for value in outputs), gradient]


def steps(device: torch.device) -> dict[str, Step]:
    """Ops, forward and backward, of [ROWS, VOCAB] numbers; everything else is on the device."""
    ids = torch.tensor([0, 5, -100, 4499, 4, 7], device=device)
    ones, rows = torch.ones(2, 3, device=device), torch.tensor([4, 1], device=device)
    weight, enabled = torch.ones(50, VOCAB, device=device), ids > 4
    mask, old = ones > 0, -ones

    def loss(x: Tensor) -> list[Tensor]:
        return [grpo_loss(x, old, ones[:, 0], mask, ref_logprobs=old, kl_coef=0.1)[0]]

    def loss_by_number(x: Tensor) -> list[Tensor]:
        return [grpo_loss(x, old, ones[:, 0], mask, normalizer=7.0)[0]]

    def loss_of_logits(x: Tensor) -> list[Tensor]:
        return [logits_grpo_loss(x.view(2, 3, -1), ids.view(2, 3), old, ones[:, 0], mask)[0]]

    def head(x: Tensor) -> list[Tensor]:
        return [*linear_logprobs_and_entropy(x, weight, ids % 50, rows=rows)]

    return {
        "both": lambda x: with_gradient(x, lambda x: [*logprobs_and_entropy(x, ids)]),
        "rows": lambda x: with_gradient(x, lambda x: [*logprobs_and_entropy(x, ids, rows=rows)]),
        "entropy": lambda x: with_gradient(x, lambda x: [entropy_from_logits(x)]),
        "logprobs": lambda x: with_gradient(x, lambda x: [selective_log_softmax(x, ids)]),
        "loss": lambda x: with_gradient(x[:2, :3], loss),
        "loss by a number": lambda x: with_gradient(x[:2, :3], loss_by_number),
        "loss of logits": lambda x: with_gradient(x, loss_of_logits),
        "advantages": lambda x: [group_advantages(x[:, 0], 3)],
        "advantages of ids": lambda x: [group_advantages(x[:, 0], ids)],
        "sample": lambda x: [*sample_tokens(x, x[:, 0].sigmoid(), banned=ids, enabled=enabled)],
        "ban": lambda x: [ban_tokens_(x.clone(), ids, enabled=enabled)],
        "head": lambda x: with_gradient(x, head),
    }


NAMES = list(steps(torch.device("cpu")))


@pytest.mark.skipif(INTERPRETED, reason="about the code around the kernels")
@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_is_not_asked(name: str, backend: str) -> None:
    """Fails if memory is taken where the caller's other tensors are, not where the inputs are."""
    x = torch.randn(ROWS, VOCAB)
    step = steps(x.device)[name]
    expected = step(x)
    with torch.device("meta"):
        got = step(x)
        group_advantages(x[:, 0], [2, 4])
    assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(not INTERPRETED, reason="about what the interpreter runs")
def test_every_kernel_is_interpreted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an op takes another path than on a device, so that nothing tests its kernel."""
    from triton.runtime.interpreter import GridExecutor

    launched, launch = set(), GridExecutor.__call__

    def record(executor: GridExecutor, *arguments: object, **named: object) -> None:
        launched.add(executor.fn.__name__)
        launch(executor, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    x = torch.randn(ROWS, VOCAB)
    made = steps(x.device)
    for step in made.values():
        step(x)
    kernels = (
        "row_statistics merge row_gradient grpo_loss token_terms group_advantages ban_tokens scale "
        "sample_statistics sample_merge sample_choose"
    ).split()
    assert launched == {f"_{name}_kernel" for name in kernels}


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Iterator[Step]:
    """The op of this name on a GPU, compiled by a first call."""
    device = torch.device("cuda")
    with device:
        made = steps(device)[request.param]
        made(torch.randn(ROWS, VOCAB))
        torch.cuda.synchronize()
        yield made


each_step = pytest.mark.parametrize("step", NAMES, indirect=True)


@pytest.mark.gpu
@each_step
def test_runs_on_the_current_stream(step: Step) -> None:
    """Fails if a kernel goes to another stream: there it would read x before x is written."""
    values = torch.randn(ROWS, VOCAB)
    expected, x = step(values), torch.zeros(ROWS, VOCAB)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = step(x.copy_(values))
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.gpu
@each_step
def test_does_not_wait_for_the_device(step: Step) -> None:
    """Fails if an op synchronizes with the host."""
    x = torch.randn(ROWS, VOCAB)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@each_step
def test_replays_in_a_graph(step: Step) -> None:
    """Fails if a captured op keeps an address or a number of its capture."""
    x = torch.randn(ROWS, VOCAB)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x)
    for _ in range(2):
        x.copy_(torch.randn(ROWS, VOCAB))
        graph.replay()
        assert all(map(torch.equal, captured, step(x)))


@pytest.mark.gpu
def test_runs_in_inductors_cuda_graphs() -> None:
    """Fails if memory of one call is used by the next, or a temperature is that of a recording."""
    torch._dynamo.reset()
    with torch.device("cuda"):
        ids, ones, mask = torch.arange(6), torch.ones(2, 3), torch.ones(2, 3) > 0

        def step(x: Tensor, temperature: float) -> Tensor:
            logprobs, entropy = logprobs_and_entropy(x, ids, temperature=temperature)
            grid = logprobs.view(2, 3)
            return grpo_loss(grid, grid.detach() - 0.1, ones, mask)[0] + entropy.sum()

        compiled = torch.compile(step, mode="reduce-overhead")
        for temperature in (1.0, 0.7, 1.0, 0.7, 0.4):
            x = torch.randn(ROWS, VOCAB)
            torch.compiler.cudagraph_mark_step_begin()
            got = with_gradient(x, lambda x: [compiled(x, temperature)])  # noqa: B023
            got = [value.clone() for value in got]
            expected = with_gradient(x, lambda x: [step(x, temperature)])  # noqa: B023
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
