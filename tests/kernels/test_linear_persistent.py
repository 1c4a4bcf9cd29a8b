"""The persistent forward of a language head: its results where it runs, its machine code here."""
# mypy: disable-error-code="arg-type,no-untyped-call"

import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_linear_logprobs_and_entropy as bench
from r1v3.kernels import devices, reference
from r1v3.kernels.linear.head import TiledHead
from r1v3.kernels.linear.logprobs import row_results
from r1v3.kernels.linear.rows import SelectedRows
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton")

from benchmarks import linear_forward_triton  # noqa: E402
from r1v3.kernels.triton import logits_statistics  # noqa: E402
from tests.kernels.test_triton_compiled import resource_usage  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16)
code = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        monkeypatch.setattr(devices, "runs_triton", lambda x: x.dtype in devices.HALF_OR_SINGLE)
    elif torch.cuda.get_device_capability() != linear_forward_triton.CAPABILITY:
        pytest.skip("this kernel is for the H100")
    with warnings.catch_warnings(), torch.device(request.param):
        # numpy comments on exp2(-inf) and inf - inf.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield request.param


def make(n: int, vocab: int, width: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A head whose logits have a standard deviation of 3, and labels all over the vocabulary."""
    ids = torch.randint(0, vocab, (n,))
    ids[: min(n, 4)] = torch.tensor([vocab - 1, 0, min(255, vocab - 1), min(256, vocab - 1)])[:n]
    return {
        "hidden": torch.randn(n, width).to(dtype),
        "weight": (torch.randn(vocab, width) * 3 * width**-0.5).to(dtype),
        "token_ids": ids,
    }


def make_exact(n: int, vocab: int, width: int) -> dict[str, Any]:
    """As `make`, of multiples of 1 and 1/8 whose products float32 adds without rounding.

    A matrix product on the CPU may then add in any order: which one, numpy's BLAS chooses by the
    processor and by a row's place in the tile.
    """
    inputs = make(n, vocab, width)
    inputs["hidden"] = torch.randint(-2, 3, (n, width)).to(torch.bfloat16)
    inputs["weight"] = torch.randint(-1, 2, (vocab, width)).to(torch.bfloat16) / 8
    return inputs


def forward(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    persistent: bool = True,
) -> list[Tensor]:
    """logprobs, entropy and (m, log s, entropy) of all rows."""
    rows = SelectedRows(hidden, token_ids)
    head = TiledHead(weight, bias, hidden.dtype, temperature, vocab_size)
    if persistent and rows.n:
        assert linear_forward_triton.supports(hidden, weight, temperature)
        values = bench.persistent_row_results(head, rows)
    else:
        values = row_results(head, rows)
    return [rows.scatter(value) for value in values]


def check(inputs: dict[str, Any], **options: Any) -> list[Tensor]:
    """Compares both results with float64; returns what `forward` does."""
    got = forward(**inputs, **options)
    truth, baseline = (
        reference.linear_logprobs_and_entropy(
            **{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, **options
        )
        for dtype in (torch.float64, torch.float32)
    )
    for i, name in enumerate(("logprobs", "entropy")):
        assert_within_budget(name, got[i], truth[i], baseline[i], 1e-5)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,vocab,width", [(0, 700, 64), (1, 1, 8), (3, 256, 64), (128, 257, 72), (141, 790, 200)]
)
def test_matches_float64(device: str, n: int, vocab: int, width: int, dtype: torch.dtype) -> None:
    """Fails if a tile beyond the rows, the vocabulary or the width of hidden counts."""
    inputs = make(n, vocab, width, dtype)
    if n > 5:
        inputs["token_ids"][5] = -100
    check(inputs)
    inputs["bias"] = torch.randn(vocab).to(dtype)
    inputs["token_ids"].clamp_(max=vocab - 1 - vocab // 4)
    inputs["weight"][vocab - vocab // 4 :] = torch.nan
    check(inputs, temperature=0.7, vocab_size=vocab - vocab // 4)


def test_equals_the_forward_by_tiles(device: str) -> None:
    """Fails if the backward, which computes tiles again, would get other row statistics."""
    inputs = make(9, 600, 200)
    inputs["bias"] = torch.randn(600)
    for options in ({}, {"temperature": 0.6, "vocab_size": 600}):
        by_tiles = forward(**inputs, **options, persistent=False)
        for given, expected in zip(forward(**inputs, **options), by_tiles, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-5)


def test_a_large_offset_cancels(device: str) -> None:
    """Fails if sums are not shifted by the maximum before anything is rounded."""
    inputs = make(130, 600, 64)
    for offset in (-20000.0, 20000.0):
        inputs["bias"] = torch.full((600,), offset)
        check(inputs)


def test_minus_infinity(device: str) -> None:
    """Fails if 0 * -inf is computed, or a first tile of nothing but -inf counts."""
    inputs = make(6, 600, 64)
    inputs["token_ids"] = torch.tensor([599, 300, 0, 255, 256, 400])
    inputs["bias"] = torch.zeros(600)
    inputs["bias"][:256] = -torch.inf
    logprobs, *_ = check(inputs)
    assert (logprobs == -torch.inf).tolist() == [False, False, True, True, False, False]
    inputs["bias"][1:] = -torch.inf
    inputs["bias"][0] = 0
    check(inputs)
    inputs["bias"][0] = -torch.inf
    logprobs, entropy, saved = check(inputs)
    assert bool((logprobs == -torch.inf).all()) and bool((entropy == 0).all())
    assert bool((saved[:, 0] == -torch.inf).all())


def test_nan_and_infinity_propagate_in_their_row_alone(device: str) -> None:
    """Fails if a NaN is dropped by a maximum, or reaches another row."""
    inputs = make(7, 600, 64)
    clean = forward(**inputs)
    inputs["hidden"][2, 5] = torch.nan
    inputs["hidden"][4, 5] = torch.inf
    for given, expected in zip(forward(**inputs)[:2], clean, strict=False):
        assert given.isnan().tolist() == [False, False, True, False, True, False, False]
        kept = ~given.isnan()
        assert torch.equal(given[kept], expected[kept])


def test_shards_are_merged_like_parts(device: str) -> None:
    """Fails if a label in another shard is picked twice or not at all, or padding counts."""
    inputs = make(140, 700, 64)
    hidden, weight, ids = (inputs[name] for name in ("hidden", "weight", "token_ids"))
    ids.clamp_(max=689)[7] = -100
    weight[690:] = torch.nan
    stats, first = [], 0
    for size in (300, 1, 389, 10):
        bounds = torch.tensor([first, 690])
        stats.append(
            linear_forward_triton.row_statistics(
                hidden, weight[first : first + size], None, ids, 0.8, bounds
            )
        )
        first += size
    bounds = torch.tensor([0, 690])
    logprobs, entropy, _ = logits_statistics.finalize(torch.stack(stats), ids, 0.8, 0, bounds)
    whole = linear_forward_triton.row_statistics(hidden, weight, None, ids, 0.8, bounds)
    expected = logits_statistics.finalize(whole[None], ids, 0.8, 0, bounds)
    torch.testing.assert_close(logprobs, expected[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy, expected[1], rtol=0, atol=3e-6)
    assert logprobs[7] == 0 and bool((logprobs[ids != -100] < 0).all())


def test_bits_do_not_depend_on_other_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if how tiles are shared out, or the batch that a row is in, changes its result."""
    inputs = (make_exact if device == "cpu" else make)(290, 600, 200)
    whole = forward(**inputs)
    for _ in range(2):
        assert all(map(torch.equal, forward(**inputs), whole))
    for some in (torch.tensor([137]), torch.tensor([289, 0, 137])):
        part = {k: v if k == "weight" else v[some] for k, v in inputs.items()}
        for given, expected in zip(forward(**part), whole, strict=True):
            assert torch.equal(given, expected[some])
    monkeypatch.setattr(linear_forward_triton, "_most_programs", lambda tensor: 7)
    monkeypatch.setattr(linear_forward_triton, "GROUP", 2)
    monkeypatch.setattr(linear_forward_triton, "LAUNCH_ROWS", 200)
    assert all(map(torch.equal, forward(**inputs), whole))


def test_rows_may_be_apart(device: str) -> None:
    """Fails if a row is taken to start where the one before ends."""
    inputs = make(20, 300, 40)
    expected = forward(**inputs)
    for name in ("hidden", "weight"):
        wide = torch.full((inputs[name].shape[0], 64), torch.nan, dtype=torch.bfloat16)
        wide[:, 16:56] = inputs[name]
        inputs[name] = wide[:, 16:56]
    assert all(map(torch.equal, forward(**inputs), expected))


def test_what_is_not_supported(device: str) -> None:
    """Fails if TMA is given rows that it cannot load, or operands that are not multiplied so."""
    hidden, weight = (make(20, 300, 64)[name] for name in ("hidden", "weight"))
    supports = linear_forward_triton.supports
    assert supports(hidden, weight, 0.5)
    assert not supports(hidden, weight, 0.0)
    assert not supports(hidden.half(), weight, 0.5)
    assert not supports(hidden.float(), weight.float(), 0.5)
    assert not supports(hidden[:, :60].contiguous(), weight[:, :60], 0.5)
    assert not supports(hidden[:, 1:57], weight[:, :56], 0.5)
    assert not supports(hidden[:, :56], weight.T.contiguous().T[:, :56], 0.5)
    assert not supports(hidden[:1].expand(20, 64), weight, 0.5)
    assert not supports(hidden[:0], weight, 0.5)


def test_gradients_match_float64(device: str) -> None:
    """Fails if what this forward keeps is not what the backward by tiles expects."""
    inputs = make(40, 300, 64)
    inputs["token_ids"][5] = -100
    upstream = torch.randn(2, 40)
    functions: dict[torch.dtype, Any] = {
        torch.float64: reference.linear_logprobs_and_entropy,
        torch.bfloat16: bench.persistent_forward,
    }
    results = []
    for dtype, function in functions.items():
        leaves = [inputs[name].to(dtype).requires_grad_() for name in ("hidden", "weight")]
        outputs = function(*leaves, inputs["token_ids"])
        loss = sum((x * u).sum() for x, u in zip(outputs, upstream, strict=True))
        results.append(torch.autograd.grad(loss, leaves))
    for truth, given in zip(*results, strict=True):
        # bfloat16 gradients of the logits and results; the interpreter truncates.
        error = (given - truth).abs().max() / truth.abs().max()
        assert error < 2.0**-6, error


class Compiler:
    """Stands in for a kernel, and compiles for an H100 what is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            # The arguments are in the CPU's memory, but this is not the interpreter.
            options["INTERPRETED"] = False
            self.result = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def compiled(
    patch: pytest.MonkeyPatch, inputs: dict[str, Any], bias: torch.dtype | None = None
) -> Any:
    """The kernel as Triton compiles it on an H100, on its way to launch it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    h100 = SimpleNamespace(
        get_current_device=lambda: -1,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    compiler = Compiler(linear_forward_triton._linear_statistics_kernel)
    vector = None if bias is None else torch.zeros(inputs["weight"].shape[0], dtype=bias)
    with patch.context() as during:
        during.setattr(driver, "_active", h100)
        during.setattr(linear_forward_triton, "_linear_statistics_kernel", compiler)
        linear_forward_triton._tile_statistics(
            inputs["hidden"], inputs["weight"], vector, inputs["token_ids"], 1.0,
            torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
    return compiler.result


@code
def test_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if sizes are compiled in: every batch has another number of rows."""
    codes = {
        compiled(monkeypatch, make(*sizes)).asm["cubin"] for sizes in ((200, 600, 136), (1, 1, 8))
    }
    assert len(codes) == 1


@code
@pytest.mark.parametrize(
    "dtype,bias",
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_machine_code(
    dtype: torch.dtype, bias: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the tensor cores wait, loads come late, registers spill or logits are rounded."""
    kernel = compiled(monkeypatch, make(200, 600, 136, dtype), bias)
    assert kernel.metadata.shared <= 227 * 1024
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    usage = resource_usage(kernel.asm["cubin"], tmp_path)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    done = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True)
    sass = done.stdout
    assert usage["STACK"] == usage["LOCAL"] == 0 and not re.search(r"\b(STL|LDL)\b", sass), usage
    # A step of the loop: its products are issued together; then those of the step before must be
    # done, whose stage is loaded anew. The first stages are loaded before the loop.
    product = f"HGMMA.64x{linear_forward_triton.COLUMNS}x16.F32"
    product += ".BF16" if dtype == torch.bfloat16 else ""
    products = linear_forward_triton.DEPTH // 16
    events = re.findall(r"HGMMA[\w.]*|WARPGROUP\.\w+(?:[\w. ]+, 0x\d)?|UTMALDG", sass)
    first = events.index(product)
    assert events[first - 1 : first + products + 3] == [
        "WARPGROUP.ARRIVE", *[product] * products, "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "UTMALDG", "UTMALDG",
    ]  # fmt: skip
    assert sass.count("HGMMA") == products
    assert sass.count("UTMALDG") == 2 * linear_forward_triton.STAGES
    # Nothing but four float32 numbers per row is stored, and nothing is rounded to 16 bits.
    assert len(re.findall(r"\bSTG\.E \[|\bSTG\.E desc", sass)) == sass.count("STG") == 4
    assert not re.search(r"F2FP|F2F\.", sass)
    # One exponential per logit, and one per row of a thread.
    logits = linear_forward_triton.ROWS * linear_forward_triton.COLUMNS
    assert sass.count("MUFU.EX2") <= logits // (linear_forward_triton.WARPS * 32) + 2
