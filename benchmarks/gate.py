"""The correctness gate: an implementation is timed only when its results are right.

r1v3 must stay within the error budget of its tests: at most twice the error of the reference
run on the same inputs, plus a tolerance for the dtype of the result or the problem's own. A rival
needs to compute the same quantity (`RIVAL_TOLERANCE`); its error is printed next to its time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.problem import Function, Problem

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Eager bfloat16 arithmetic on 150,000 logits is off by almost 0.1 nats.
RIVAL_TOLERANCE = 0.25
CHUNK_ELEMENTS = 2**24
GRADIENT_ROWS = 64
COMPARED_ELEMENTS = 2**26


@dataclass(frozen=True)
class Answer:
    """Outputs, and gradients by input name where the mode has a backward."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """The float64 answer, and the error the reference makes on the inputs as they are.

    `rows` are the rows that are compared, None for all of them.
    """

    answer: Answer
    rows: Tensor | None
    reference_errors: dict[str, float]


def run_forward(problem: Problem, function: Function) -> tuple[Tensor, ...]:
    """The outputs, recorded for no backward."""
    with torch.no_grad():
        return function(**problem.inputs)


def record(
    problem: Problem, function: Function
) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Outputs with their graph, the leaves they depend on, and the upstream gradients."""
    leaves = {
        name: problem.inputs[name].detach().requires_grad_() for name in problem.differentiated
    }
    outputs = function(**{**problem.inputs, **leaves})
    differentiable = outputs[: len(problem.upstream)]
    upstream = [u.to(o.dtype) for o, u in zip(differentiable, problem.upstream, strict=True)]
    return outputs, list(leaves.values()), upstream


def run_backward(
    recorded: tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]],
) -> tuple[Tensor, ...]:
    """Gradients of the leaves."""
    outputs, leaves, upstream = recorded
    return torch.autograd.grad(outputs[: len(upstream)], leaves, upstream)


def answer(problem: Problem, function: Function) -> Answer:
    """The function's results for the problem; inputs that it overwrites are copies."""
    fresh = {name: problem.inputs[name].clone() for name in problem.mutated}
    problem = replace(problem, inputs={**problem.inputs, **fresh})
    if problem.mode == "forward":
        return Answer(run_forward(problem, function), {})
    recorded = record(problem, function)
    gradients = run_backward(recorded)
    names = problem.differentiated
    outputs = tuple(output.detach() for output in recorded[0])
    return Answer(outputs, dict(zip(names, gradients, strict=True)))


def solve(problem: Problem) -> Truth:
    """The truth, computed a few rows at a time in float64.

    Gradients of rows are compared on `GRADIENT_ROWS` evenly spaced rows, first and last included;
    everything else is compared in full. Of a gradient that all rows share, only the sum so far and
    one part's are in memory.
    """
    rows = _compared_rows(problem)
    exact, plain = _Parts(problem), _Parts(problem)
    for part in _parts(problem, rows):
        plain.add(answer(part, problem.reference))
        exact.add(answer(_in_float64(part), problem.reference))
    truth = exact.joined()
    return Truth(truth, rows, _errors(truth, plain.joined()))


def errors(problem: Problem, truth: Truth, given: Answer) -> dict[str, float]:
    """Largest error of each output (absolute) and gradient (relative to its largest entry).

    NaN where the truth is a number counts as infinitely wrong. An answer with fewer outputs is
    compared on those it has.

    Raises:
        ValueError: for an output or gradient of another shape than the truth.
    """
    if truth.rows is not None:
        outputs = tuple(output[truth.rows] for output in given.outputs)
        gradients = {
            name: gradient[truth.rows] if name in problem.row_inputs else gradient
            for name, gradient in given.gradients.items()
        }
        given = Answer(outputs, gradients)
    return _errors(truth.answer, given)


def objection(
    found: dict[str, float], truth: Truth, given: Answer, tolerance: float, *, is_ours: bool
) -> str | None:
    """The reason not to time the implementation, or None; `tolerance` is the problem's."""
    for name, error in found.items():
        if is_ours:
            allowed = max(TOLERANCE[_quantity(given, name).dtype], tolerance)
            limit = 2 * truth.reference_errors[name] + allowed
        else:
            limit = RIVAL_TOLERANCE
        if not error <= limit:
            return f"wrong: error of {name} is {error:.2g}, at most {limit:.2g} is allowed"
    return None


def _quantity(given: Answer, name: str) -> Tensor:
    if name in given.gradients:
        return given.gradients[name]
    return given.outputs[int(name.removeprefix("output "))]


def _errors(truth: Answer, given: Answer) -> dict[str, float]:
    if not given.outputs or len(given.outputs) > len(truth.outputs):
        raise ValueError(f"expected up to {len(truth.outputs)} outputs, got {len(given.outputs)}")
    found = {
        f"output {i}": _distance(f"output {i}", output, exact)
        for i, (output, exact) in enumerate(zip(given.outputs, truth.outputs, strict=False))
    }
    for name, exact in truth.gradients.items():
        largest = float(exact.abs().max()) or 1.0
        found[name] = _distance(name, given.gradients[name], exact) / largest
    return found


def _distance(name: str, value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(exact.shape)}")
    largest = torch.zeros((), dtype=torch.float64, device=exact.device)
    pieces = (x.reshape(-1).split(COMPARED_ELEMENTS) for x in (value, exact))
    for given, right in zip(*pieces, strict=True) if exact.numel() else ():
        given = given.to(torch.float64)
        # Equal infinities, which ban_tokens_ makes, have no distance.
        distance = torch.where(given == right, 0.0, (given - right).abs())
        largest = largest.maximum(distance.nan_to_num(nan=torch.inf).max())
    return float(largest)


def _compared_rows(problem: Problem) -> Tensor | None:
    if not set(problem.differentiated) <= set(problem.row_inputs) or problem.mode == "forward":
        return None
    total = problem.inputs[problem.row_inputs[0]].shape[0]
    device = problem.inputs[problem.row_inputs[0]].device
    steps = min(total, GRADIENT_ROWS)
    return torch.linspace(0, total - 1, steps, dtype=torch.float64, device=device).round().long()


def _parts(problem: Problem, rows: Tensor | None) -> Iterator[Problem]:
    """The problem on a few rows at a time, or as it is where rows depend on each other."""
    if not problem.row_inputs:
        yield problem
        return
    first = problem.inputs[problem.row_inputs[0]]
    if rows is None:
        rows = torch.arange(first.shape[0], device=first.device)
    width = problem.shape["V"]
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // width)):
        sliced = {name: problem.inputs[name][chunk] for name in problem.row_inputs}
        upstream = tuple(gradient[chunk] for gradient in problem.upstream)
        yield replace(problem, inputs={**problem.inputs, **sliced}, upstream=upstream)


def _in_float64(problem: Problem) -> Problem:
    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in problem.inputs.items()
    }
    return replace(problem, inputs=inputs, upstream=tuple(u.double() for u in problem.upstream))


class _Parts:
    """Answers on some rows each: rows in their order, gradients of shared inputs added up."""

    def __init__(self, problem: Problem) -> None:
        self.row_inputs = problem.row_inputs
        self.outputs: list[tuple[Tensor, ...]] = []
        self.rows: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, part: Answer) -> None:
        """Take the next rows' answer; sums of more than one are float64."""
        self.outputs.append(part.outputs)
        for name, gradient in part.gradients.items():
            if name in self.row_inputs:
                self.rows.setdefault(name, []).append(gradient)
            elif name in self.sums:
                self.sums[name] = self.sums[name].double().add_(gradient)
            else:
                self.sums[name] = gradient

    def joined(self) -> Answer:
        """The answer on all rows."""
        outputs = tuple(_concatenated(pieces) for pieces in zip(*self.outputs, strict=True))
        rows = {name: _concatenated(pieces) for name, pieces in self.rows.items()}
        return Answer(outputs, {**rows, **self.sums})


def _concatenated(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
