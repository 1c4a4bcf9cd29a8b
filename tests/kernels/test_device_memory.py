"""Memory and host scalars of the ops on a device, which CUDA graphs depend on; on fake tensors."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import cuda as one_pass
from r1v3.kernels import grpo_terms, vocab_parallel
from r1v3.kernels.grpo_loss import _grpo_loss
from r1v3.kernels.grpo_terms import GrpoInputs, GrpoOptions, TokenTerms
from r1v3.kernels.linear import gradients as gradients_module
from r1v3.kernels.linear import grpo as linear_grpo
from r1v3.kernels.linear import head as head_module
from r1v3.kernels.linear.rows import SelectedRows
from tests.kernels.conftest import INTERPRETED
from tests.kernels.fake_cuda import Watch, cuda

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here")
__all__ = ["cuda"]
# The package has the function under the module's name.
logits_module: Any = import_module("r1v3.kernels.logits_grpo_loss")
B, T = 4, 64
OPTIONS = GrpoOptions(0.2, 0.2, None, "ppo", 0.1, "k3", False, "sequence-mean")


def inputs(normalizer: Tensor | float | None, packed: bool = False) -> GrpoInputs:
    shape = (B * T,) if packed else (B, T)
    values = torch.ones(shape)
    offsets = torch.arange(B + 1) * T if packed else None
    return GrpoInputs.of(
        values, values, torch.ones(B), torch.ones(shape, dtype=torch.bool), values, torch.ones(B),
        offsets, normalizer, OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize("normalizer", [None, 7.0])
def test_no_memory_outlives_its_call(normalizer: float | None, cuda: Watch) -> None:
    """Fails if an op keeps a tensor of one call for the next: in a CUDA graph it is the graph's.

    torch.compile(mode="reduce-overhead") then raises at the first call.
    """
    stream: Any = SimpleNamespace(cuda_stream=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        for _ in range(2):
            given = inputs(normalizer)
            results = _grpo_loss(
                torch.ones(B * T), given.terms, given.mask, None, T, given.normalizer,
                OPTIONS.as_floats(),
            )  # fmt: skip
    assert cuda.launches == ["_grpo_loss_kernel"] * 2
    del results, given
    assert cuda.alive() == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_numbers_come_to_the_device_without_a_copy(kind: str, packed: bool, cuda: Watch) -> None:
    """Fails if a normalizer is copied from the host, which the capture of a CUDA graph refuses."""
    given = inputs(40.0 if kind == "float" else torch.full((), 40.0), packed)
    mask, terms = TokenTerms.of(given)
    _grpo_loss(
        torch.ones(B * T), given.terms, given.mask, given.offsets, given.length, given.normalizer,
        OPTIONS.as_floats(),
    )  # fmt: skip
    terms.grad_logprobs(torch.ones(B * T), mask)
    assert given.normalizer is not None and given.normalizer.device.type == "cuda"
    assert cuda.operations and cuda.copies_from_the_host == []


@pytest.mark.parametrize("packed", [False, True])
def test_terms_of_tokens_take_one_launch(
    packed: bool, cuda: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if forty small kernels around the loss take the host longer than its kernel runs."""
    given = inputs(torch.full((), 40.0), packed)
    # The op itself would give what its fake implementation does.
    monkeypatch.setattr(grpo_terms, "_token_terms_op", grpo_terms._token_terms)
    cuda.operations.clear()
    mask, terms = TokenTerms.of(given)
    assert cuda.launches == ["_token_terms_kernel"]
    assert mask.shape == terms.loss_scale.shape == terms.advantages.shape == (B * T,)
    made = ("new_empty", "empty_like", "view", "detach", "device")  # and no kernel of torch's
    assert [name for name, _ in cuda.operations if name.split(".")[1] not in made] == []


def test_bounds_of_shards_are_remembered_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the first call with a group keeps a tensor, which may be a CUDA graph's memory."""
    group, known, exchanges = object(), dict[Any, Any](), []

    def exchange(*arguments: Any) -> Tensor:
        exchanges.append(arguments)
        return torch.tensor([30, 90])

    monkeypatch.setattr(vocab_parallel, "process_group", lambda name: group)
    monkeypatch.setattr(vocab_parallel, "_known_bounds", known)
    monkeypatch.setattr(vocab_parallel, "_exchange_widths", exchange)
    for _ in range(2):
        bounds = vocab_parallel.shard_bounds(30, None, "g", torch.device("cpu"))
        assert bounds.dtype == torch.int64 and bounds.tolist() == [30, 90]
    assert len(exchanges) == 1
    assert list(known[group].values()) == [(30, 90)]


def test_ops_that_read_a_number_on_the_host_stay_out_of_cuda_graphs() -> None:
    """Fails if a replayed graph launches kernels with the temperature of its recording."""
    names = (
        "logprobs_and_entropy logits_gradient logits_grpo linear_logprobs_and_entropy "
        "linear_gradient linear_grpo"
    ).split()
    schemas = torch._C._jit_get_all_schemas()
    reading = {
        schema.name.removeprefix("r1v3::")
        for schema in schemas
        if schema.name.startswith("r1v3::")
        and any(x.name == "temperature" for x in schema.arguments)
    }
    assert reading == {*names, "sample_tokens"}  # whose temperature is on the device
    for name in names:
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.r1v3, name).default.tags, name


def few_rows() -> tuple[Tensor, Tensor, head_module.TiledHead, SelectedRows]:
    """Eight bfloat16 hidden rows and a weight, its head, and the rows, which go through whole."""
    hidden, weight = (torch.ones(n, 64, dtype=torch.bfloat16) for n in (8, 512))
    head = head_module.TiledHead(weight, None, hidden.dtype, 1.0)
    rows = SelectedRows(hidden, torch.ones(8, dtype=torch.int64), rows=torch.arange(8))
    rows.whole = True
    return hidden, weight, head, rows


def test_the_gradient_of_few_hidden_rows_is_summed_in_float32(
    cuda: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a library that cuts the product along the vocabulary may add parts in bfloat16."""
    hidden, weight, head, rows = few_rows()
    results = []

    def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        results.append((tuple(out.shape), out.dtype, add))

    monkeypatch.setattr(head_module, "multiply", multiply)
    monkeypatch.setattr(gradients_module, "multiply", multiply)
    sums = gradients_module.Gradients(
        head, rows, [True, True, False], gradients_module.HiddenReduction(rows, ""),
        (torch.bfloat16, torch.bfloat16), hidden_at_once=head.whole_rows,
    )  # fmt: skip
    sums.add(slice(0, 512), weight, slice(0, 8), weight.T[:8], hidden)
    assert results[0] == ((8, 64), torch.float32, False)
    grad_hidden, grad_weight, _ = sums.results()
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16


def test_the_gradient_of_logits_is_written_as_it_is_multiplied(
    cuda: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if it is written in float32 and copied to bfloat16: half as many bytes again."""
    _, _, head, rows = few_rows()
    written: list[Tensor] = []
    multiplied: list[Tensor] = []
    results = torch.ones(8), torch.ones(8), torch.ones(8, 3)
    rows_module = linear_grpo.softmax_rows
    monkeypatch.setattr(head_module, "multiply", lambda a, b, out, *, add: None)
    monkeypatch.setattr(Tensor, "__setitem__", lambda *given: None)  # asks for the library
    monkeypatch.setattr(rows_module, "forward", lambda logits, labels: results)
    monkeypatch.setattr(rows_module, "backward", lambda logits, out, *rest: written.append(out))
    _, terms = TokenTerms.of(inputs(None))
    sums: Any = SimpleNamespace(add=lambda *given: multiplied.append(given[3]))
    linear_grpo._rows_by_rows(head, rows, terms, sums, 8)
    (out,), (operand,) = written, multiplied
    assert out.dtype == operand.dtype == torch.bfloat16 and out.shape == operand.shape == (8, 512)


@pytest.mark.parametrize("trains", [False, True])
def test_the_one_pass_kernel_runs_with_and_without_a_gradient(
    trains: bool, cuda: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if evaluation takes another kernel than training, and so gives other bits."""
    launched = []

    def launch(logits: Tensor, gradient: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        launched.append(gradient)
        return torch.zeros(B * T), torch.zeros(B * T)

    monkeypatch.setattr(one_pass, "cluster", lambda logits, vocab: 4)
    monkeypatch.setattr(one_pass, "logits_grpo_loss", launch)
    logits = torch.ones(B, T, 1000, dtype=torch.bfloat16)
    gradient = torch.empty_like(logits) if trains else None
    _, terms = TokenTerms.of(inputs(None))
    one = torch.ones((), dtype=torch.float64, device="cpu")
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 1.0)
    logits_module._logits_grpo(
        logits, gradient, torch.ones(B * T, dtype=torch.int64), terms.tensors(), terms.options,
        one, None, "",
    )  # fmt: skip
    assert launched == [gradient] and "_row_statistics_kernel" not in cuda.launches
