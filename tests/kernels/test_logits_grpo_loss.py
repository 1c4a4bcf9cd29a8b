"""`logits_grpo_loss`: the loss of logits and its gradient, on every implementation here."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import grpo_loss, logits_grpo_loss, logprobs_and_entropy, reference
from r1v3.kernels.arguments import METRICS
from tests.kernels.conftest import BACKENDS, CPU_BACKENDS, INTERPRETED, slow_interpreted

EMULATED = pytest.param("emulated", marks=pytest.mark.slow)
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize(
        "backend", BACKENDS if INTERPRETED else (*BACKENDS, EMULATED), indirect=True
    ),
]
B, T = 3, 5
DTYPES = [torch.float32, torch.bfloat16]
if not INTERPRETED:  # which is slow
    DTYPES += [torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.2, "kl": "k3",
        "aggregation": "token-mean", "temperature": 0.7, "vocab_size": 990,
    },
    "constant": {"aggregation": "constant", "normalizer": 40.0, "kl": "k1", "kl_coef": 0.1},
    "cispo": {"ratio_clip": "cispo", "clip_low": 0.3, "kl_coef": 0.1},
    "unbiased KL": {"kl_coef": 0.3, "unbiased_kl": True, "dual_clip": 3.0},
}  # fmt: skip


def batch(vocab: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits with masked tokens that hold NaN, a label -100, and ratios on both sides of 1."""
    logits = (3 * torch.randn(B, T, vocab)).to(dtype)
    ids = torch.randint(0, min(vocab, 990), (B, T))
    mask = torch.rand(B, T) < 0.8
    mask[0, :3] = torch.tensor([True, False, True])
    exact = reference.logprobs_and_entropy(logits.double(), ids)[0].float()
    logits[~mask] = math.nan
    ids[0, 2] = -100
    return {
        "logits": logits,
        "token_ids": ids,
        "old_logprobs": exact + 0.4 * torch.randn(B, T),
        "advantages": torch.randn(B, T),
        "loss_mask": mask,
        "ref_logprobs": exact + 0.3 * torch.randn(B, T),
        "weights": torch.rand(B) + 0.5,
    }


def specified(given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Loss, gradient and metrics by the specification, with logits in this dtype."""
    x = given["logits"].to(dtype, copy=True).requires_grad_()
    keep = given["loss_mask"] & (given["token_ids"] != -100)
    rows = keep.reshape(-1).nonzero().squeeze(-1)
    temperature, vocab = options.pop("temperature", 1.0), options.pop("vocab_size", None)
    chosen, spread = reference.logprobs_and_entropy(
        x, given["token_ids"], temperature=temperature, vocab_size=vocab, rows=rows
    )
    zero = chosen.new_zeros(B * T)
    logprobs, entropy = zero.index_copy(0, rows, chosen), zero.index_copy(0, rows, spread)
    loss, _, metrics = reference.grpo_loss(
        logprobs, given["old_logprobs"].reshape(-1), given["advantages"].reshape(-1),
        given["loss_mask"].reshape(-1), torch.arange(B + 1) * T,
        ref_logprobs=given["ref_logprobs"].reshape(-1), weights=given["weights"], **options,
    )  # fmt: skip
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradient": x.grad,
        **dict(zip(METRICS, metrics.detach(), strict=True)),
        "token_logprobs": logprobs.detach().view(B, T),
        "token_entropy": entropy.detach().view(B, T),
        "entropy": entropy.detach().sum() / given["loss_mask"].sum(),
    }


def run(given: dict[str, Tensor], factor: float = 1.0, **options: Any) -> dict[str, Tensor]:
    leaf = given["logits"].clone().requires_grad_()
    loss, metrics = logits_grpo_loss(**{**given, "logits": leaf * 1}, **options)
    (factor * loss).backward()
    return {"loss": loss.detach(), "gradient": leaf.grad, **metrics}


def check(given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    truth = specified(given, torch.float64, **options)
    single = specified(given, torch.float32, **options)
    got = run(given, **options)
    assert set(got) == set(truth)
    for key, exact in truth.items():
        error = (got[key].double() - exact).abs()
        plain = (single[key].double() - exact).abs().max()
        # One rounding of the gradient to the dtype of the logits; the interpreter truncates.
        ulp = torch.finfo(dtype).eps * (1 if INTERPRETED else 0.5)
        rounding = ulp * exact.abs() if key == "gradient" else 0.0
        tiny = torch.finfo(dtype).smallest_normal * ulp
        assert (error <= 2 * plain + 1e-5 * exact.abs().max() + rounding + tiny).all(), key
    masked = ~given["loss_mask"] | (given["token_ids"] == -100)
    assert (got["gradient"][masked] == 0).all()
    assert (got["token_logprobs"][masked] == 0).all() and (got["token_entropy"][masked] == 0).all()
    assert (got["gradient"][..., options.get("vocab_size", 10**6) :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["everything", "cispo"] if INTERPRETED else OPTIONS)
def test_matches_float64(name: str, dtype: torch.dtype) -> None:
    """Fails if a result is less accurate than the specification in float32 allows."""
    check(batch(1003, dtype), dtype, **OPTIONS[name])


@pytest.mark.parametrize("vocab", [1, 7, 8, 1023, 1025])
def test_vocabularies_around_a_vector_and_a_block(vocab: int) -> None:
    """Fails if an element at an end of a row is lost, counted twice or gets no gradient."""
    check(batch(vocab, torch.bfloat16), torch.bfloat16, kl_coef=0.1)


def test_hostile_tokens() -> None:
    """Fails if a ratio or KL of e^200, an empty sequence or inf at a masked token leaks."""
    given = batch(60)
    given["logits"][:] = torch.randn(B, T, 60)
    given["loss_mask"] = torch.tensor([[True] * 5, [False] * 5, [True, True, True, False, False]])
    for name in ("old_logprobs", "ref_logprobs"):
        given[name] += torch.tensor([[0.0, 200.0, -200.0, 0.1, 1e30]])
    given["advantages"] = torch.tensor([[1.0, -1.0, 0.0, 2.0, -1.0]]).expand(B, T).clone()
    for name, bad in (("old_logprobs", math.inf), ("ref_logprobs", -math.inf),
                      ("advantages", math.nan)):  # fmt: skip
        given[name][~given["loss_mask"]] = bad
    check(given, torch.float32, kl_coef=0.1)


@pytest.mark.parametrize("vocab", [151_674, pytest.param(152_064, marks=slow_interpreted)])
def test_model_vocabulary(vocab: int) -> None:
    """Fails at rows of 151,674 logits, most of which start off 16-byte boundaries."""
    logits = (3 * torch.randn(1, 3, vocab)).bfloat16()
    ids = torch.tensor([[vocab - 1, 0, 70_000]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    loss, _ = logits_grpo_loss(leaf, ids, None, torch.tensor([1.5]), mask)
    loss.backward()
    logprobs, _ = reference.logprobs_and_entropy(other.double(), ids)
    expected = -(1.5 * (logprobs - logprobs.detach()).exp()).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=2**-6, atol=1e-9)


@slow_interpreted
@pytest.mark.parametrize("factor", [-2.5] if INTERPRETED else [1.0, -2.5])
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_in_place_is_the_same(dtype: torch.dtype, factor: float) -> None:
    """Fails if the gradient in place has other bits or memory, or an upstream factor is lost."""
    given = batch(1003, dtype)
    apart = run(given, factor)
    leaf = given["logits"].clone().requires_grad_()
    x = leaf * 1
    x.retain_grad()
    loss, _ = logits_grpo_loss(**{**given, "logits": x}, inplace_backward=True)
    (factor * loss).backward(retain_graph=True)
    assert torch.equal(leaf.grad, apart["gradient"]) and torch.equal(loss.detach(), apart["loss"])
    assert x.grad.data_ptr() == x.data_ptr() or torch.equal(x.grad, x.detach())
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()
    unscaled = run(given)["gradient"].double()
    torch.testing.assert_close(
        apart["gradient"].double(), factor * unscaled, rtol=2 * torch.finfo(dtype).eps, atol=1e-7
    )


@slow_interpreted
def test_second_backward_says_why() -> None:
    """Fails if a gradient that was handed out, and perhaps changed, is handed out again."""
    given = batch(40)
    leaf = given["logits"].clone().requires_grad_()
    loss, _ = logits_grpo_loss(**{**given, "logits": leaf})
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward needs a second call"):
        loss.backward()


@slow_interpreted
def test_equals_the_loss_of_its_log_probabilities() -> None:
    """Fails if this op and `grpo_loss` of `logprobs_and_entropy` mean different things."""
    given = batch(300)
    given["logits"] = torch.randn(B, T, 300)
    got = run(given, kl_coef=0.1)
    leaf = given["logits"].clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(leaf, given["token_ids"])
    tokens = {k: v for k, v in given.items() if k not in ("logits", "token_ids")}
    loss, metrics = grpo_loss(logprobs, kl_coef=0.1, **tokens)
    loss.backward()
    torch.testing.assert_close(got["loss"], loss.detach())
    torch.testing.assert_close(got["gradient"], leaf.grad)
    for name in METRICS:
        torch.testing.assert_close(got[name], metrics[name])
    valid = given["loss_mask"] & (given["token_ids"] != -100)
    torch.testing.assert_close(got["token_entropy"][valid], entropy.detach()[valid])


@slow_interpreted
def test_packed_equals_padded() -> None:
    """Fails if cu_seqlens cut the tokens elsewhere than the rows of a batch."""
    given = batch(120)
    padded = run(given)
    flat = {k: v if k == "weights" else v.flatten(0, 1) for k, v in given.items()}
    packed = run(flat, cu_seqlens=torch.arange(B + 1) * T)
    assert torch.equal(padded["loss"], packed["loss"])
    assert torch.equal(padded["gradient"], packed["gradient"].view_as(padded["gradient"]))


def test_without_gradient() -> None:
    """Fails if evaluation computes or keeps a gradient, or gives another loss."""
    given = batch(77)
    loss, metrics = logits_grpo_loss(**given)
    assert not loss.requires_grad
    with torch.no_grad():
        again, _ = logits_grpo_loss(**{**given, "logits": given["logits"].clone().requires_grad_()})
    trained = run(given)
    assert torch.equal(loss, again) and torch.equal(loss, trained["loss"])
    assert torch.equal(metrics["token_entropy"], trained["token_entropy"])


@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (2, 0)])
def test_nothing_counts(shape: tuple[int, int]) -> None:
    """Fails if a batch without a valid token, or without tokens, gives NaN."""
    logits = torch.full((*shape, 9), math.nan, requires_grad=True)
    loss, metrics = logits_grpo_loss(
        logits, torch.full(shape, 77), None, torch.ones(shape[0]), torch.zeros(shape)
    )
    loss.backward()
    assert loss == 0 and metrics["tokens"] == 0 and metrics["entropy"] == 0
    assert (logits.grad == 0).all()


def test_edge_rows() -> None:
    """Fails if -inf logits give NaN, or NaN and +inf do not stay in their own row."""
    logits = torch.randn(1, 5, 4500)
    logits[0, 0, :4400] = -math.inf
    logits[0, 1] = -math.inf
    logits[0, 2, 77] = math.nan
    logits[0, 3, 4499] = math.inf
    ids = torch.tensor([[4450, 5, 6, 7, 8]])
    leaf = logits.clone().requires_grad_()
    old = torch.full((1, 5), -9.0)
    loss, metrics = logits_grpo_loss(leaf, ids, old, torch.ones(1), torch.ones(1, 5))
    loss.backward()
    assert metrics["token_logprobs"][0, 1] == -math.inf and metrics["token_entropy"][0, 1] == 0
    assert metrics["nonfinite"] == 3
    broken = [False, False, True, True, False]
    assert metrics["token_entropy"][0].isnan().tolist() == broken
    assert leaf.grad[0].isnan().any(-1).tolist() == broken
    assert (leaf.grad[0, 1] == 0).all() and (leaf.grad[0, 0, :4400] == 0).all()


@slow_interpreted
def test_any_layout() -> None:
    """Fails if strides change the result, or shared memory is overwritten."""
    given = batch(60)
    given["logits"] = torch.randn(B, T, 60)
    expected = run(given)
    for name, value in given.items():
        if name != "logits":
            given[name] = value.repeat_interleave(2, -1)[..., ::2]
    wide = torch.randn(B, T + 1, 64)
    wide[:, :-1, :60] = given["logits"]
    views = {
        "cut": wide[:, :-1, :60],
        "transposed": given["logits"].transpose(0, 1).contiguous().transpose(0, 1),
        "columns": given["logits"].repeat_interleave(2, -1)[..., ::2],
    }
    for inplace in (True,) if INTERPRETED else (False, True):
        for view in views.values():
            x = view.detach().requires_grad_()
            loss, _ = logits_grpo_loss(**{**given, "logits": x}, inplace_backward=inplace)
            loss.backward()
            assert torch.equal(loss.detach(), expected["loss"])
            torch.testing.assert_close(x.grad, expected["gradient"])
    shared = torch.randn(1, 1, 60, requires_grad=True)
    kept = shared.detach().clone()
    together = {**given, "logits": shared.expand(B, T, 60)}
    logits_grpo_loss(**together, inplace_backward=True)[0].backward()
    assert torch.equal(shared.detach(), kept)


def test_rows_more_than_two_to_the_31_elements_apart() -> None:
    """Fails if the offset of a row, read or overwritten, is computed in 32 bits."""
    far = torch.empty(2**31 + 5_009, dtype=torch.bfloat16)
    far = far.as_strided((3, 1, 5_007), (2**30 + 1, 5_007, 1))
    dense, ids = torch.randn(3, 1, 5_007).bfloat16(), torch.randint(0, 5_007, (3, 1))
    for x in (dense, far.copy_(dense)):
        x.requires_grad_()
        loss, _ = logits_grpo_loss(x, ids, None, torch.ones(3), ids >= 0, inplace_backward=x is far)
        loss.backward()
    assert torch.equal(far.detach(), far.grad)
    torch.testing.assert_close(far.grad, dense.grad, rtol=2**-7, atol=1e-6)


@slow_interpreted
def test_bits_do_not_depend_on_the_run_or_the_batch() -> None:
    """Fails if a second run, or with a global normalizer the other rows, change a bit."""
    given = batch(1000, torch.bfloat16)
    options = dict(aggregation="token-mean", normalizer=15.0)
    first, second = (run(given, **options) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone = run({key: value[1:2] for key, value in given.items()}, **options)
    for key in ("gradient", "token_logprobs", "token_entropy"):
        assert torch.equal(alone[key], first[key][1:2])


@slow_interpreted
def test_wrong_labels_and_arguments_raise(backend: str) -> None:
    """Fails if a label of a token that counts is wrong and goes through, or masked ones matter."""
    given = batch(50)
    given["token_ids"][~given["loss_mask"]] = 10**9
    run(given)
    if backend in CPU_BACKENDS:
        given["token_ids"][0, 0] = 50
        with pytest.raises(ValueError, match=r"token_ids must be in \[0, 50\)"):
            run(given)
    else:
        given["token_ids"][0, 0] = 50
        assert run(given)["token_logprobs"].isnan().view(-1).tolist() == [True] + [False] * 14
    for change, message in (
        ({"token_ids": torch.zeros(B, T + 1, dtype=torch.int64)}, "token_ids must have shape"),
        ({"kl": "k4"}, "kl must be one of"),
        ({"loss_mask": torch.ones(B)}, "loss_mask must have shape"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"vocab_size": 51}, "vocab_size must be at most the 50"),
    ):
        with pytest.raises(ValueError, match=message):
            logits_grpo_loss(**{**given, **change})


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's")
def test_gradcheck() -> None:
    """Fails if the gradient is not the derivative of the loss."""
    given = batch(7)
    tokens = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    logits = torch.randn(B, T, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: logits_grpo_loss(**{**tokens, "logits": x}, kl_coef=0.3, temperature=0.8)[0],
        (logits,),
    )


@pytest.mark.skipif(INTERPRETED, reason="compilation does not see the kernels")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self, backend: str) -> None:
        if backend in ("reference", "emulated"):
            pytest.skip("once is enough")
        torch._dynamo.reset()

    def test_full_graph_equals_eager_and_compiles_few_times(self) -> None:
        """Fails on a graph break, a wrong gradient, or a compile per length or temperature."""
        from torch._dynamo.testing import CompileCounterWithBackend

        def step(x: Tensor, ids: Tensor, old: Tensor, temperature: float) -> Tensor:
            loss, metrics = logits_grpo_loss(
                x, ids, old, old[:, 0], ids > 2, temperature=temperature, inplace_backward=True
            )
            return 3 * loss + metrics["entropy"]

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for n in (10, 12, 20, 26, 34):
            for temperature in (1.0, 0.7, 0.35, 0.2, 1.5):
                x, ids = torch.randn(2, n, 32), torch.randint(0, 9, (2, n))
                results = []
                for function in (step, compiled):
                    leaf = x.clone().requires_grad_()
                    loss = function(leaf * 1, ids, torch.randn(2, n).fill_(-3.0), temperature)
                    loss.backward()
                    results.append((loss.detach(), leaf.grad))
                for eager, graph in zip(*results, strict=True):
                    torch.testing.assert_close(graph, eager)
        assert counter.frame_count <= 3
