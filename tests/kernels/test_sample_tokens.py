"""Drawing a token per row, on every implementation this process can run."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1v3.kernels import logprobs_and_entropy, sample_tokens
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED, slow_interpreted

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Results = tuple[Tensor, Tensor, Tensor]
# The backend is the same for all examples of a test.
often = settings(
    max_examples=2 if INTERPRETED else 25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def truth(x: Tensor, uniforms: Tensor, temperature: float | Tensor = 1.0) -> Results:
    """By the definition, in float64."""
    y = x.double() / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = y.log_softmax(-1)
    cumulative = logp.exp().cumsum(-1)
    wanted = (uniforms.double() * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
    return tokens, *of_tokens(logp, tokens)


def of_tokens(logp: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    entropy = -torch.where(logp == -math.inf, 0.0, logp.exp() * logp).sum(-1)
    return logp.gather(1, tokens[:, None]).squeeze(1), entropy


def assert_true(got: Results, wanted: Results) -> None:
    assert torch.equal(got[0], wanted[0])
    for value, exact in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=5e-7, atol=2e-7)


def same_bits(a: Results, b: Results) -> bool:
    return all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "vocab",
    [
        *(pytest.param(size, marks=slow_interpreted) for size in (1, 2, 7, 63, 511, 512, 1037)),
        513,
        4100,
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_logprobs_and_entropy_are_those_of_the_definition(
    dtype: torch.dtype, vocab: int
) -> None:
    """Fails if a draw is not the inverse CDF's, or its numbers are off by more than rounding."""
    x = (4 * torch.randn(2 if INTERPRETED else 40, vocab)).to(dtype)
    x[:, 1::5] = -math.inf
    uniforms = torch.rand(len(x))
    before = x.clone()
    got = sample_tokens(x, uniforms, temperature=0.7)
    assert_true(got, truth(x, uniforms, 0.7))
    assert torch.equal(x, before)
    assert got[0].dtype == torch.int64
    assert got[1].dtype == got[2].dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="rows as long take the interpreter minutes")
@pytest.mark.parametrize("vocab,spread", [(151_674, 0.0), (151_936, 1.0), (152_064, 8.0)])
def test_a_models_vocabulary(vocab: int, spread: float) -> None:
    """Fails if many small weights are lost, or sums of them lose digits."""
    x, uniforms = spread * torch.randn(4, vocab), torch.tensor([0.0, 0.3, 0.77, 1 - 2**-24])
    got = sample_tokens(x, uniforms)
    logp = x.double().log_softmax(-1)
    cumulative = logp.exp().cumsum(-1)
    before = cumulative - logp.exp()
    reached = uniforms.double() * cumulative[:, -1]
    index = got[0][:, None]
    assert (before.gather(1, index).squeeze(1) <= reached + 1e-9).all()
    assert (cumulative.gather(1, index).squeeze(1) >= reached - 1e-9).all()
    for value, exact in zip(got[1:], of_tokens(logp, got[0]), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-7, atol=1e-6)


def chi_square_is_plausible(ids: Tensor, probabilities: Tensor) -> bool:
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(ids)
    some = expected > 0
    statistic = float(((counts - expected)[some] ** 2 / expected[some]).sum())
    freedom = int(some.sum()) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom) and not counts[~some].any()


@pytest.mark.skipif(INTERPRETED, reason="a program per draw takes the interpreter minutes")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    """Fails if tokens are not drawn as often as their probabilities say."""
    logits = torch.randn(50) * 1.5
    logits[::7] = -math.inf
    n = 20_000
    ids, *_ = sample_tokens(logits.expand(n, -1), torch.rand(n), temperature=temperature)
    assert chi_square_is_plausible(ids, torch.softmax(logits / temperature, -1))
    flat = torch.full((50,), -math.log(50.0))
    assert not chi_square_is_plausible(ids, flat.exp())  # the check can fail


@pytest.mark.parametrize(
    "uniform", [pytest.param(u, marks=slow_interpreted) for u in (0.0, 1 - 2**-24, 1 - 2**-53, 0.5)]
)
def test_a_token_without_probability_is_never_drawn(uniform: float) -> None:
    """Fails where banned tokens come first or last, at the ends of the interval."""
    for alive in ([3], [0], [9], [2, 7], [1, 8]):
        x = torch.full((3, 10), -math.inf)
        x[:, alive] = torch.tensor([[0.0], [-60.0], [900.0]])
        uniforms = torch.full((3,), uniform, dtype=torch.float64)
        tokens, logprobs, entropy = sample_tokens(x, uniforms)
        assert set(tokens.tolist()) <= set(alive)
        expected = torch.full((3,), math.log(len(alive)))
        torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(logprobs, -expected, rtol=1e-6, atol=1e-9)


@slow_interpreted
def test_the_ends_of_the_interval_draw_the_first_and_the_last_token() -> None:
    """Fails if 0 skips a token, or the largest number below 1 passes the last one."""
    x = torch.zeros(4, 9)
    x[:, [0, 8]] = -math.inf
    uniforms = torch.tensor([0.0, 1 - 2**-24, 1.0, -1.0])  # and outside, by the nearest inside
    assert sample_tokens(x, uniforms)[0].tolist() == [1, 7, 7, 1]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with bans, ties, NaN and offsets, a uniform number and a temperature per row."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, vocab = draw(st.integers(2, 7)), draw(st.sampled_from([1, 3, 40, 600, 1100]))
    x = draw(st.sampled_from([0.0, 0.1, 3.0, 40.0])) * torch.randn(n, vocab)
    x += draw(st.sampled_from([0.0, -30.0, 1000.0])) * torch.rand(n, 1)
    x[torch.rand(n, vocab) < draw(st.sampled_from([0.0, 0.3, 0.98]))] = -math.inf
    x[torch.rand(n, vocab) < draw(st.sampled_from([0.0, 0.0, 1 / vocab]))] = math.nan
    if draw(st.booleans()):
        x = x.round()
    temperature = torch.tensor([0.0, 0.01, 0.7, 1.0, 3.0])[torch.randint(0, 5, (n,))]
    return x.to(draw(st.sampled_from(DTYPES[:3]))), torch.rand(n), temperature


@slow_interpreted
@often
@given(rows(), st.integers(0, 2**31))
def test_a_row_depends_on_no_other(case: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    """Fails if a row's bits change with its place in the batch or with its neighbors."""
    x, uniforms, temperature = case
    whole = sample_tokens(x, uniforms, temperature=temperature)
    torch.manual_seed(seed)
    order = torch.randint(0, len(x), (len(x) + 2,))
    moved = sample_tokens(x[order], uniforms[order], temperature=temperature[order])
    assert same_bits(moved, tuple(value[order] for value in whole))
    one = slice(1, 2)
    alone = sample_tokens(x[one], uniforms[one], temperature=temperature[one])
    assert same_bits(alone, tuple(value[one] for value in whole))


@slow_interpreted
@often
@given(rows())
def test_padding_changes_nothing(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fails if columns beyond the vocabulary are drawn, carry mass or change a bit."""
    x, uniforms, temperature = case
    padded = torch.nn.functional.pad(x, (0, 13), value=1e4)
    got = sample_tokens(padded, uniforms, temperature=temperature, vocab_size=x.shape[1])
    assert same_bits(got, sample_tokens(x, uniforms, temperature=temperature))


@often
@given(rows(), st.booleans())
def test_bans_are_minus_infinity(case: tuple[Tensor, Tensor, Tensor], everywhere: bool) -> None:
    """Fails if a ban is another distribution than that of logits of -inf, or bans elsewhere."""
    x, uniforms, temperature = case
    vocab = x.shape[1]
    ids = torch.cat([torch.randint(0, vocab, (vocab // 3 + 1,)), torch.tensor([-1, vocab, 2**40])])
    enabled = None if everywhere else torch.randint(0, 2, (len(x),))
    banned = x.clone()
    where = torch.ones(len(x)) if enabled is None else enabled
    banned[:, ids[:-3]] = torch.where(where[:, None] != 0, -math.inf, x[:, ids[:-3]]).to(x.dtype)
    got = sample_tokens(x, uniforms, temperature=temperature, banned=ids, enabled=enabled)
    assert same_bits(got, sample_tokens(banned, uniforms, temperature=temperature))


@slow_interpreted
def test_every_row_has_its_temperature() -> None:
    """Fails if rows share a temperature, or a tensor gives other bits than a number."""
    x, uniforms = 3 * torch.randn(12, 100), torch.rand(12)
    temperature = torch.linspace(0.1, 3.0, 12, dtype=torch.float64)
    got = sample_tokens(x, uniforms, temperature=temperature)
    assert_true(got, truth(x, uniforms, temperature))
    for i, one in enumerate(temperature.tolist()):
        alone = sample_tokens(x[i], uniforms[i], temperature=one)
        assert same_bits(alone, tuple(value[i] for value in got))
        assert alone[0].shape == ()


def test_greedy_takes_the_first_of_the_largest() -> None:
    """Fails if a uniform number matters at temperature 0, or the numbers are not of 1."""
    n = 2 if INTERPRETED else 30
    x = torch.randn(n, 1300).bfloat16()  # in which bfloat16 makes ties
    x[:, 7] = -math.inf
    uniforms = torch.rand(n)
    tokens, *numbers = sample_tokens(x, uniforms, temperature=0.0, top_k=3, top_p=0.5, min_p=0.1)
    assert torch.equal(tokens, x.float().argmax(-1))
    wanted = of_tokens(x.double().log_softmax(-1), tokens)
    for value, exact in zip(numbers, wanted, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-7, atol=2e-7)
    mixed = torch.where(torch.arange(n) % 2 == 0, 0.0, 0.7)
    got = sample_tokens(x, uniforms, temperature=mixed)
    assert torch.equal(got[0][::2], tokens[::2])
    assert torch.equal(got[0][1::2], sample_tokens(x, uniforms, temperature=0.7)[0][1::2])


def test_forced_tokens_are_given_and_measured() -> None:
    """Fails if a forced token is drawn over, or its numbers are not of the same distribution."""
    n = 4 if INTERPRETED else 10
    x, uniforms = torch.randn(n, 700), torch.rand(n)
    banned = torch.tensor([5, 6])
    forced = torch.tensor([-1, 0, 699, 5, 640, -1, 3, 3, 3, 6])[:n]
    tokens, logprobs, entropy = sample_tokens(x, uniforms, forced=forced, banned=banned)
    free = sample_tokens(x, uniforms, banned=banned)
    assert torch.equal(tokens, torch.where(forced >= 0, forced, free[0]))
    assert torch.equal(entropy, free[2])
    legal = x.clone()
    legal[:, banned] = -math.inf
    wanted, _ = logprobs_and_entropy(legal, tokens)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=1e-6)
    assert (logprobs[(forced == 5) | (forced == 6)] == -math.inf).all()
    greedy = sample_tokens(x, uniforms, forced=forced, temperature=0.0)[0]
    assert torch.equal(greedy, torch.where(forced >= 0, forced, x.argmax(-1)))


def warped(
    x: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """Logits by transformers' processors, in vLLM's order."""
    from transformers import generation

    y = x.double() / temperature
    if min_p is not None:
        y = generation.MinPLogitsWarper(min_p)(None, y)
    if top_k is not None:
        y = generation.TopKLogitsWarper(top_k)(None, y)
    if top_p is not None:
        y = generation.TopPLogitsWarper(top_p)(None, y)
    return y


@pytest.mark.parametrize(
    "top_k,top_p,min_p",
    [
        *(pytest.param(*settings, marks=slow_interpreted) for settings in (
            (1, None, None), (5, None, None), (2000, None, None), (None, 0.9, None),
            (None, 0.3, None), (None, 1.0, None), (None, 1e-9, None), (None, None, 0.1),
            (None, None, 1.0), (7, 0.8, None), (7, None, 0.05), (None, 0.9, 0.02),
        )),
        (20, 0.7, 0.01),
    ],
)  # fmt: skip
def test_truncation_is_that_of_transformers(
    top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Fails if another set of tokens is kept, or the numbers are not of the kept ones alone."""
    n = 3 if INTERPRETED else 12
    x, uniforms = 2 * torch.randn(n, 900), torch.rand(n)
    got = sample_tokens(x, uniforms, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_true(got, truth(warped(x, 0.8, top_k, top_p, min_p), uniforms))


@slow_interpreted
def test_a_nucleus_of_few_and_of_many_tokens() -> None:
    """Fails if a row whose nucleus is large is cut short, or changes the rows beside it."""
    x, uniforms = torch.randn(6, 3000), torch.rand(6)
    x[::2] *= 6  # these reach 0.95 within some tokens, the others within two thousand
    got = sample_tokens(x, uniforms, top_p=0.95)
    assert_true(got, truth(warped(x, 1.0, None, 0.95, None), uniforms))
    for i in range(6):
        alone = sample_tokens(x[i : i + 1], uniforms[i : i + 1], top_p=0.95)
        assert same_bits(alone, tuple(value[i : i + 1] for value in got))


@slow_interpreted
def test_equal_logits_stay_together() -> None:
    """Fails if which of equal tokens is kept depends on a sorting order."""
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).repeat(50, 1)
    uniforms = torch.linspace(0, 0.999, 50)
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.99}):
        tokens, _, entropy = sample_tokens(x, uniforms, **options)  # type: ignore[arg-type]
        assert set(tokens.tolist()) == {1, 2, 3, 4}
        kept = torch.tensor([3.0, 2.0, 2.0, 2.0]).log_softmax(-1)
        torch.testing.assert_close(entropy, -(kept.exp() * kept).sum().expand(50))


@slow_interpreted
def test_a_banned_token_is_not_among_the_top() -> None:
    """Fails if truncation counts what the ban took."""
    x, uniforms = torch.arange(10.0).repeat(40, 1), torch.linspace(0, 0.999, 40)
    tokens, *_ = sample_tokens(x, uniforms, banned=torch.tensor([9, 7]), top_k=2)
    assert set(tokens.tolist()) == {8, 6}


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=slow_interpreted) for d in DTYPES if d.itemsize != 2)],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(pytest.param(option, marks=slow_interpreted)
          for option in ({"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 2})),
    ],
)  # fmt: skip
def test_rows_without_a_distribution(dtype: torch.dtype, options: dict[str, float]) -> None:
    """Fails if NaN or +inf is hidden, a row of -inf is NaN, or a neighbor is touched."""
    x = torch.randn(6, 1200).to(dtype)
    x[1] = -math.inf
    x[2, 700] = math.nan
    x[3, [30, 1199]] = math.inf
    x[4] = -math.inf
    x[4, 600] = math.nan
    tokens, logprobs, entropy = sample_tokens(x, torch.rand(6), **options)  # type: ignore[arg-type]
    assert tokens[1:5].tolist() == [0, 700, 30, 600]
    assert logprobs[1] == -math.inf and entropy[1] == 0
    assert logprobs[2:5].isnan().all() and entropy[2:5].isnan().all()
    assert logprobs[[0, 5]].isfinite().all() and entropy[[0, 5]].isfinite().all()
    tokens, logprobs, _ = sample_tokens(x, torch.rand(6), banned=torch.tensor([700, 30, 1199]))
    assert logprobs[[2, 3]].isfinite().all()  # a banned NaN is not there


@pytest.mark.parametrize(
    "largest,temperature",
    [
        *(
            pytest.param(*pair, marks=slow_interpreted)
            for pair in ((3e38, 1.0), (1e30, 1e-30), (10.0, 1e-20), (10.0, 1e-38), (1e-30, 1e-38))
        ),
        (-3e38, 1.0),
    ],
)
def test_numbers_of_every_size(largest: float, temperature: float) -> None:
    """Fails if an exponent overflows: the largest logit is far above the others here."""
    x = torch.tensor([largest, largest * (0.5 if largest > 0 else 1.1), -math.inf]).repeat(3, 1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-24])
    tokens, logprobs, entropy = sample_tokens(x, uniforms, temperature=temperature)
    assert tokens.tolist() == [0, 0, 0]
    assert logprobs.abs().max() < 1e-9 and entropy.abs().max() < 1e-9


CUTS = ["rows", "columns", "batch", "transposed", "one row", "expanded"]


@pytest.mark.parametrize(
    "cut", ["every other", *(pytest.param(cut, marks=slow_interpreted) for cut in CUTS)]
)
def test_any_layout(cut: str) -> None:
    """Fails if strided logits are read elsewhere."""
    base = torch.randn(2, 3, 30)
    view = {
        "rows": base[0, 1:],
        "columns": base[0, :, 2:20],
        "batch": base[:, :-1],
        "transposed": base.transpose(1, 2)[:, :4],
        "one row": base[1, 2],
        "expanded": base[0, 0].expand(5, 30),
        "every other": base[1, :, ::2],
    }[cut]
    wide = torch.rand(*view.shape[:-1], 2)
    got = sample_tokens(view, wide[..., 1], temperature=wide[..., 0])
    packed = sample_tokens(
        view.contiguous(), wide[..., 1].contiguous(), temperature=wide[..., 0].contiguous()
    )
    assert same_bits(got, packed) and got[0].shape == view.shape[:-1]


def test_no_rows() -> None:
    """Fails if an empty batch raises or loses its shape."""
    for shape in ((0,), (3, 0)):
        got = sample_tokens(torch.zeros(*shape, 5), torch.zeros(shape), top_p=0.5)
        assert [value.shape for value in got] == [shape] * 3


def test_nothing_carries_a_gradient() -> None:
    """Fails if the results pretend to be differentiable."""
    x = torch.randn(2, 5, requires_grad=True)
    assert not any(value.requires_grad for value in sample_tokens(x, torch.rand(2)))


def test_wrong_arguments_raise(backend: str) -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    x, u = torch.randn(2, 5), torch.rand(2)
    cases: list[tuple[Tensor, Tensor, dict[str, object], str]] = [
        (x.long(), u, {}, "logits must be a floating-point"),
        (x[:, :0], u, {}, "logits must have columns"),
        (x, u[:1], {}, r"uniforms must have shape \[2\], got \[1\]"),
        (x, u > 0, {}, "uniforms must be floating point, got torch.bool"),
        (x, u, {"temperature": -1.0}, "temperature must be finite and >= 0, got -1"),
        (x, u, {"temperature": math.nan}, "temperature must be finite"),
        (x, u, {"temperature": torch.ones(3)}, "temperature must have shape"),
        (x, u, {"temperature": torch.ones(2).long()}, "temperature must be floating point"),
        (x, u, {"banned": torch.tensor(1)}, r"banned must be integers \[K\]"),
        (x, u, {"banned": torch.ones(1)}, r"banned must be integers \[K\]"),
        (x, u, {"enabled": torch.ones(3)}, "enabled must have shape"),
        (x, u, {"forced": torch.ones(3).long()}, "forced must have shape"),
        (x, u, {"forced": torch.ones(2)}, "forced must be integers"),
        (x, u, {"top_k": 0}, "top_k must be >= 1, got 0"),
        (x, u, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        (x, u, {"min_p": 1.5}, r"min_p must be in \(0, 1\], got 1.5"),
        (x, u, {"vocab_size": 6}, "vocab_size must be at most the 5 columns"),
        (x, u, {"vocab_size": 0}, "vocab_size must be >= 1"),
    ]
    if backend in CPU_BACKENDS:
        cases += [
            (
                x,
                u,
                {"forced": torch.tensor([0, 5])},
                r"forced must be in \[0, 5\) or -1, got \[5\]",
            ),
            (x, u, {"forced": torch.tensor([-2, 0])}, r"forced must be in .* got \[-2\]"),
            (x, u, {"temperature": torch.tensor([1.0, -1.0])}, "temperature must be finite"),
        ]
    for logits, uniforms, options, message in cases:
        with pytest.raises(ValueError, match=message):
            sample_tokens(logits, uniforms, **options)  # type: ignore[arg-type]
