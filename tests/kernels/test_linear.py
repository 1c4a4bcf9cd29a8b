"""lm_head to log-probability and entropy, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import cpu, linear_logprobs_and_entropy
from r1v3.kernels.linear import head, tiles
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED, slow_interpreted

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="not about the arithmetic of a kernel")
# To the kernels they are all the same: logits are float32.
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("logprobs", "entropy", "hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def start(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers for every test; the reference multiplies bfloat16 by converting it."""
    torch.manual_seed(0)
    if backend == "reference":
        monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 columns and 5 rows, chunks of 5 rows: several of each in the tests' problem."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "CPU_BLOCK_ROWS", 5)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE", 5 * 300 * 4)
    monkeypatch.setattr(tiles, "DEVICE_BLOCK_ROWS", 5)
    monkeypatch.setattr(tiles, "DEVICE_TILE", 1)


def make(dtype: torch.dtype = torch.float32, vocab: int = 300) -> dict[str, Any]:
    ids = torch.randint(0, 290, (3, 8))
    ids[0, 2] = -100
    return {
        "hidden": torch.randn(3, 8, 24).to(dtype),
        "weight": torch.randn(vocab, 24).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "token_ids": ids,
        "loss_mask": torch.rand(3, 8) < 0.7,
    }


def run(
    function: Any, inputs: dict[str, Any], dtype: torch.dtype, upstream: Tensor, **options: Any
) -> list[Tensor]:
    """Both outputs and three gradients."""
    leaves = {
        name: inputs[name].to(dtype).clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
    }
    outputs = function(**{**inputs, **leaves}, temperature=0.8, vocab_size=290, **options)
    sum((value * u).sum() for value, u in zip(outputs, upstream, strict=True)).backward()
    return [*(value.detach() for value in outputs), *(leaf.grad for leaf in leaves.values())]


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    temperature: float,
    vocab_size: int,
) -> list[Tensor]:
    """All logits in the weight's dtype, then log_softmax: what is usually written."""
    log_p = ((hidden @ weight.T + bias)[..., :vocab_size] / temperature).log_softmax(-1)
    keep = loss_mask & (token_ids != -100)
    picked = log_p.gather(-1, token_ids.clamp(min=0)[..., None]).squeeze(-1)
    return [torch.where(keep, v, 0.0) for v in (picked, -(log_p.exp() * log_p).sum(-1))]


@pytest.mark.parametrize("tiles", ["small"] if INTERPRETED else ["small", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, tiles: str, request: pytest.FixtureRequest) -> None:
    """Fails if an output or one of three gradients is worse than the usual computation's."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    inputs, upstream = make(dtype), torch.randn(2, 3, 8)
    truth = run(plain, inputs, torch.float64, upstream)
    baseline = run(plain, inputs, dtype, upstream)
    got = run(linear_logprobs_and_entropy, inputs, dtype, upstream)
    for name, g, t, b in zip(NAMES, got, truth, baseline, strict=True):
        assert g.dtype == (dtype if name in ("hidden", "weight", "bias") else torch.float32)
        assert_within_budget(name, g, t, b, 2e-5)
    assert (got[3][290:] == 0).all() and (got[4][290:] == 0).all(), "padded columns"


@slow_interpreted
def test_logits_of_a_language_model_stay_exact() -> None:
    """Fails if logits pass through bfloat16: then a log-probability is off by 5e-2, not 2e-4.

    Rows of 20,000 logits whose largest are 20 to 30, as a language model's.
    """
    hidden = torch.randn(12, 256).bfloat16()
    weight = (torch.randn(20_000, 256) * 6 / 16).bfloat16()
    logits = hidden.double() @ weight.double().T
    ids = logits.topk(4).indices[:, 3]
    assert 20 < logits.amax(-1).median() < 30
    exact = logits.log_softmax(-1)
    truth = exact.gather(-1, ids[:, None]).squeeze(-1)
    logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, ids)
    assert (logprobs - truth).abs().max() < 2e-4
    assert (entropy + (exact.exp() * exact).sum(-1)).abs().max() < 2e-4
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    assert (rounded - truth).abs().max() > 1e-2


def test_gradcheck(small_tiles: None) -> None:
    """Fails if the recomputed backward is not the derivative."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make().items()}
    leaves = [inputs.pop(k)[..., :5].clone().requires_grad_() for k in ("hidden", "weight")]
    leaves.append(inputs.pop("bias").requires_grad_())

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs_and_entropy(
            hidden, weight, bias=bias, temperature=0.7, vocab_size=290, **inputs
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The operands of every matrix product, as they are multiplied."""
    seen: list[tuple[Tensor, Tensor]] = []
    multiply = head.multiply

    def watch(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        seen.append((a.clone(), b))
        multiply(a, b, out, add=add)

    monkeypatch.setattr(head, "multiply", watch)
    monkeypatch.setattr("r1v3.kernels.linear.gradients.multiply", watch)
    return seen


def work(products: list[tuple[Tensor, Tensor]]) -> int:
    """Multiplications."""
    return sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b in products)


@slow_interpreted
def test_dropped_rows_never_reach_a_product(products: list[tuple[Tensor, Tensor]]) -> None:
    """Fails if rows with loss_mask 0 or label -100 cost anything, or their NaN gets through."""
    inputs = make()
    kept = inputs["loss_mask"] & (inputs["token_ids"] != -100)
    inputs["hidden"][~kept] = math.nan
    inputs["token_ids"][~inputs["loss_mask"]] = 10**9  # not even looked at
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    logprobs, entropy = linear_logprobs_and_entropy(**inputs)
    (logprobs + entropy).sum().backward()
    assert work(products) == 4 * int(kept.sum()) * 300 * 24
    assert all(a.isfinite().all() and b.isfinite().all() for a, b in products)
    assert (logprobs[~kept] == 0).all() and (entropy[~kept] == 0).all()
    assert (hidden.grad[~kept] == 0).all() and weight.grad.isfinite().all()


@not_interpreted
@pytest.mark.parametrize("trained,gemms", [("hidden", 2), ("weight", 2), ("bias", 1)])
def test_frozen_parts_cost_no_product(
    trained: str, gemms: int, products: list[tuple[Tensor, Tensor]]
) -> None:
    """Fails if a frozen lm_head or body still costs its product, or breaks the other's gradient."""
    inputs = make()
    inputs["loss_mask"][:] = True
    leaves = {
        k: inputs[k].clone().requires_grad_(k == trained) for k in ("hidden", "weight", "bias")
    }
    logprobs, _ = linear_logprobs_and_entropy(**{**inputs, **leaves})
    assert work(products) == 23 * 300 * 24
    products.clear()
    logprobs.sum().backward()
    assert work(products) == gemms * 23 * 300 * 24
    assert [k for k, leaf in leaves.items() if leaf.grad is not None] == [trained]
    assert not linear_logprobs_and_entropy(**inputs)[0].requires_grad


@slow_interpreted
def test_selected_rows(products: list[tuple[Tensor, Tensor]], small_tiles: None) -> None:
    """Fails if `rows` computes others, in another order, or differs from the full results."""
    inputs = make()
    del inputs["loss_mask"]
    rows = torch.tensor([17, 3, 2])  # the last has label -100
    results = []
    for options in ({}, {"rows": rows}):
        products.clear()
        leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight")}
        outputs = linear_logprobs_and_entropy(**{**inputs, **leaves}, **options)
        if not options:
            outputs = [value.view(-1)[rows] for value in outputs]
            outputs[1] = torch.where(torch.tensor([True, True, False]), outputs[1], 0.0)
        upstream = torch.tensor([0.5, -2.0, 0.0])
        sum((value * upstream).sum() for value in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves.values())])
    assert work(products) == 4 * 3 * 300 * 24
    results[1][1] = results[1][1] * torch.tensor([1.0, 1.0, 0.0])
    for full, selected in zip(*results, strict=True):
        torch.testing.assert_close(selected, full, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("selection", ["mask", "rows"])
def test_nothing_to_compute(selection: str, dtype: torch.dtype) -> None:
    """Fails if no row to compute breaks forward or backward, or makes float64 results float32."""
    inputs = make(dtype)
    mask = inputs.pop("loss_mask")
    given: dict[str, Any] = {"loss_mask": torch.zeros_like(mask)}
    if selection == "rows":
        given = {"rows": torch.empty(0, dtype=torch.int64)}
    leaves = {k: inputs[k].requires_grad_() for k in ("hidden", "weight", "bias")}
    logprobs, entropy = linear_logprobs_and_entropy(**inputs, **given)
    assert logprobs.shape == (mask.shape if selection == "mask" else (0,))
    assert logprobs.dtype == entropy.dtype == dtype
    (logprobs + entropy).sum().backward()
    assert (logprobs == 0).all() and all((leaf.grad == 0).all() for leaf in leaves.values())


def hard_logits() -> tuple[Tensor, Tensor]:
    """Logits [8, 300] that break peers, as hidden states of an identity head; labels [8]."""
    logits = 4 * torch.randn(8, 300)
    logits[0, :140] = -torch.inf  # a whole tile of them
    logits[1] = -torch.inf
    logits[2, 5] = torch.nan
    logits[3] -= 3000
    logits[4] = 7.0  # constant
    logits[5, 3] = 500.0  # one-hot
    logits[7, 140] = torch.inf
    return logits, torch.tensor([200, 7, 9, 299, 0, 3, 150, 140])


@slow_interpreted
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 0.0])
def test_hard_cases(temperature: float, small_tiles: None) -> None:
    """Fails if tiles turn -inf into NaN, lose NaN, or cancel digits of far-away logits.

    The bias carries the hard logits, one problem per row, so that no product makes 0 * inf.
    """
    logits, ids = hard_logits()
    for x, label in zip(logits, ids, strict=True):
        options = dict(bias=x, temperature=temperature)
        got = linear_logprobs_and_entropy(torch.zeros(1, 4), torch.zeros(300, 4), label[None],
                                          **options)  # fmt: skip
        y = x.double()
        if bool((x == -torch.inf).all()):
            want = -torch.inf, 0.0
        elif temperature == 0:
            top = (y == y.max()).double()
            want = (top / top.sum())[label].log().item(), top.sum().log().item()
            if bool((y.isnan() | (y == torch.inf)).any()):
                want = math.nan, math.nan
        else:
            log_p = (y / temperature).log_softmax(-1)
            p_log_p = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p)
            want = log_p[label].item(), -p_log_p.sum().item()
        for value, truth in zip(got, want, strict=True):
            exact = torch.tensor([truth], dtype=torch.float64)
            torch.testing.assert_close(value.double(), exact, rtol=5e-6, atol=1e-5, equal_nan=True)


def test_a_huge_ignored_logit_keeps_gradients_finite(small_tiles: None) -> None:
    """Fails if a banned token (bias -inf) gives NaN gradients, which every eager version does."""
    inputs = make()
    inputs["bias"][10:150] = -torch.inf
    inputs["token_ids"].clamp_(min=160)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    logprobs, entropy = linear_logprobs_and_entropy(**inputs)
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all() and (weight.grad[10:150] == 0).all()


@not_interpreted
def test_an_unused_entropy_changes_nothing() -> None:
    """Fails if the gradient of log-probabilities alone reads the entropy, or costs accuracy."""
    inputs = make()
    gradients = []
    for entropy_weight in (None, 0.0):
        hidden = inputs["hidden"].clone().requires_grad_()
        logprobs, entropy = linear_logprobs_and_entropy(**{**inputs, "hidden": hidden})
        loss = logprobs.sum()
        (loss if entropy_weight is None else loss + entropy_weight * entropy.sum()).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)


@not_interpreted
def test_expanded_upstream_and_strided_inputs(small_tiles: None) -> None:
    """Fails if a stride other than the contiguous one is ignored in an input or upstream."""
    inputs = make()
    wide = torch.randn(3, 8, 48)
    hidden = wide[..., ::2].detach().requires_grad_()
    weight = torch.randn(24, 300).T.detach().requires_grad_()
    outputs = linear_logprobs_and_entropy(hidden, weight, inputs["token_ids"].T.contiguous().T)
    sum(value.sum() for value in outputs).backward()
    h, w = (x.detach().contiguous().requires_grad_() for x in (hidden, weight))
    want = linear_logprobs_and_entropy(h, w, inputs["token_ids"])
    (want[0] * torch.ones(3, 8) + want[1] * torch.ones(3, 8)).sum().backward()
    for a, b in [(hidden.grad, h.grad), (weight.grad, w.grad), *zip(outputs, want, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@not_interpreted
def test_bits_do_not_change_from_run_to_run(small_tiles: None) -> None:
    """Fails if an output or a gradient has other bits in a second run."""
    inputs, upstream = make(torch.bfloat16), torch.randn(2, 3, 8)
    first, second = (
        run(linear_logprobs_and_entropy, inputs, torch.bfloat16, upstream) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@not_interpreted
def test_row_tile_makes_rows_independent_of_the_batch() -> None:
    """Fails if a row's bits depend on how many others there are, or on its place among them."""
    hidden, weight = torch.randn(41, 200), torch.randn(700, 200)
    ids = torch.randint(0, 700, (41,))
    results = {}
    for rows in (torch.arange(41), torch.tensor([30, 2, 7]), torch.tensor([40])):
        leaf = hidden.clone().requires_grad_()
        values = linear_logprobs_and_entropy(leaf, weight, ids, rows=rows, row_tile=16)
        sum(v.sum() for v in values).backward()
        results[len(rows)] = [*(v.detach() for v in values), leaf.grad[rows]]
    for n, rows in ((3, torch.tensor([30, 2, 7])), (1, torch.tensor([40]))):
        assert all(torch.equal(a[rows], b) for a, b in zip(results[41], results[n], strict=True))
    plain_values = linear_logprobs_and_entropy(hidden, weight, ids)
    for value, tiled in zip(plain_values, results[41], strict=False):
        torch.testing.assert_close(value, tiled)


def test_wrong_arguments_raise(backend: str) -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    h, w, ids = torch.randn(4, 6), torch.randn(9, 6), torch.zeros(4, dtype=torch.int64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weight": w.T}, r"weight must be \[V, 6\]"),
        ({"token_ids": ids[:3]}, r"token_ids must have shape \[4\]"),
        ({"bias": w[0]}, r"bias must have shape \[9\]"),
        ({"loss_mask": ids[:2]}, "loss_mask must have"),
        ({"vocab_size": 10}, "vocab_size must be at"),
        ({"temperature": -1}, "temperature must be"),
        ({"rows": ids, "loss_mask": ids}, "not both"),
        ({"rows": ids.float()}, "rows must be int64"),
        ({"row_tile": 0}, "row_tile must be"),
    ]
    if backend != "cuda":
        cases.append(({"rows": ids}, "rows must not repeat"))
        cases.append(({"rows": ids[:1] + 4}, r"rows must be in \[0, 4\)"))
    if backend in CPU_BACKENDS:
        cases.append(({"token_ids": ids + 9}, r"token_ids must be in \[0, 9\)"))
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_logprobs_and_entropy(**{"hidden": h, "weight": w, "token_ids": ids, **given})
