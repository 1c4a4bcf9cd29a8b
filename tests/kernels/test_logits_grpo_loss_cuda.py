"""The CUDA kernel of `logits_grpo_loss`: its arithmetic on the CPU, its machine code for sm_90.

The device code's row algorithm is a header; `emulate_grpo_row.cpp` runs it with loops in place of
threads, fast enough for every alignment and every branch of the loss. `test_cuda_emulated.py` runs
the kernel itself, thread by thread.
"""

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import reference
from tests.kernels.conftest import INTERPRETED

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/cuda/logits_grpo_loss.cu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
OPTIONS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.1, "kl": "k3"}
CISPO = {**OPTIONS, "dual_clip": None, "ratio_clip": "cispo"}
pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing here is a Triton kernel")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("emulator") / "emulate.so"
    command = ["c++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    command += ["-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(ROOT / "tests/kernels/emulate_grpo_row.cpp")], check=True)
    function = ctypes.CDLL(str(library)).emulate
    function.restype = ctypes.c_bool
    return function


def emulate(
    emulator: Any,
    logits: Tensor,
    label: int,
    blocks: int,
    token: dict[str, float],
    temperature: float = 1.0,
    options: dict[str, Any] = OPTIONS,
    in_place: bool = False,
) -> tuple[float, float, Tensor]:
    """Log-probability, entropy and gradient; every element must be read and written once.

    token may hold loss_scale, old, advantage, weight and ref.
    """
    vocab = logits.shape[0]
    out = logits if in_place else torch.full_like(logits, 7.0)
    reads, writes = torch.zeros(2, vocab, dtype=torch.int32).unbind()
    values = (token.get("loss_scale", 1.0), token.get("old", 0.0), token.get("advantage", 1.0),
              token.get("weight", 1.0), token.get("ref", 0.0))  # fmt: skip
    chosen = (options["clip_low"], options["clip_high"], options["dual_clip"] or 0.0,
              options.get("ratio_clip") == "cispo", options["kl_coef"],
              int(options["kl"][1]) - 1, options.get("unbiased_kl", False), 0)  # fmt: skip
    results = (ctypes.c_float * 2)()
    aligned = emulator(
        DTYPES[logits.dtype], ctypes.c_void_p(logits.data_ptr()), ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(vocab), blocks, ctypes.c_int64(label), (ctypes.c_float * 5)(*values),
        "old" in token, "ref" in token, ctypes.c_float(temperature),
        (ctypes.c_double * 8)(*chosen), ctypes.c_void_p(reads.data_ptr()),
        ctypes.c_void_p(writes.data_ptr()), results,
    )  # fmt: skip
    assert aligned, "a 16-byte access off its boundary"
    assert (reads == 1).all() and (writes == 1).all()
    return results[0], results[1], out


def exact(
    logits: Tensor,
    label: int,
    token: dict[str, float],
    temperature: float = 1.0,
    options: dict[str, Any] = OPTIONS,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, float, Tensor]:
    """The same by the specification."""
    x = logits.to(dtype).requires_grad_()
    logprob, entropy = reference.logprobs_and_entropy(
        x[None], torch.tensor([label]), temperature=temperature
    )

    def one(name: str) -> Tensor | None:
        return torch.tensor([token[name]], dtype=torch.float64) if name in token else None

    advantage = one("advantage")
    loss, _, _ = reference.grpo_loss(
        logprob, one("old"), torch.ones(1) if advantage is None else advantage, torch.ones(1),
        torch.tensor([0, 1]), ref_logprobs=one("ref"), weights=one("weight"),
        aggregation="constant", normalizer=1 / token.get("loss_scale", 1.0), **options,
    )  # fmt: skip
    loss.backward()
    assert x.grad is not None
    return logprob.item(), entropy.item(), x.grad


def offset_row(vocab: int, dtype: torch.dtype, offset: int) -> Tensor:
    """[vocab] logits, `offset` elements past a 16-byte boundary."""
    storage = torch.empty(vocab + 64, dtype=dtype)
    size = dtype.itemsize
    start = (-storage.data_ptr() // size) % (16 // size) + offset
    row = storage[start : start + vocab]
    assert row.data_ptr() % 16 == offset * size
    row.copy_(3 * torch.randn(vocab))
    return row


def check(emulator: Any, row: Tensor, label: int, blocks: int, in_place: bool = False) -> None:
    near = exact(row, label, {}, 0.8)[0]
    token = {
        "loss_scale": 0.25,
        "old": near + 0.1,
        "advantage": -0.7,
        "weight": 0.9,
        "ref": near - 0.3,
    }
    want = exact(row, label, token, 0.8)
    single = exact(row, label, token, 0.8, dtype=torch.float32)
    got = emulate(emulator, row, label, blocks, token, 0.8, in_place=in_place)
    for value, plain, truth in zip(got[:2], single[:2], want[:2], strict=True):
        assert abs(value - truth) <= 2 * abs(plain - truth) + 2e-6 * max(1, abs(truth))
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[row.dtype]
    error = (got[2].double() - want[2]).abs()
    allowed = (rounding + 1e-5) * want[2].abs() + 1e-12
    allowed[label] += 1e-7  # 1 - p cancels
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "vocab", [1, 8, 1025, *(pytest.param(v, marks=pytest.mark.slow) for v in (7, 15, 1023))]
)
def test_every_alignment_and_cluster(emulator: Any, vocab: int, dtype: torch.dtype) -> None:
    """Fails if an element of the head, a slice or the tail is lost, doubled or misplaced."""
    for offset, blocks in itertools.product(range(16 // dtype.itemsize), (1, 2, 4, 8)):
        for label in {0, vocab // 2, vocab - 1}:
            check(emulator, offset_row(vocab, dtype, offset), label, blocks)


@pytest.mark.parametrize("vocab", [151_674, 151_936, 152_064])
def test_model_vocabularies(emulator: Any, vocab: int) -> None:
    """Fails at the rows the kernel was written for, of which 151,674 are off 16-byte bounds."""
    for offset in range(8):
        label = int(torch.randint(vocab, ()))
        row = offset_row(vocab, torch.bfloat16, offset)
        check(emulator, row, label, blocks=8, in_place=offset % 2 == 1)
    check(emulator, offset_row(vocab, torch.float32, 1), vocab - 1, blocks=8)


def test_every_branch_of_the_loss(emulator: Any) -> None:
    """Fails if clipping, dual clip, KL, weights or the clamp differ from the specification."""
    row = offset_row(40, torch.float32, 1)
    logprob = exact(row, 5, {})[0]
    distances = (-30.0, -1.0, -0.1, 0.0, 0.1, 0.24, 0.26, 1.0, 2.0, 30.0)
    seen = 0
    for old, advantage, kl, dual in itertools.product(distances, (-1.5, 0.0, 2.0), (1, 2, 3),
                                                      (0.0, 3.0)):  # fmt: skip
        for gap in (None, -0.3, 0.01, 25.0):
            options = {**OPTIONS, "kl": f"k{kl}", "dual_clip": dual}
            token = {"old": logprob - old, "advantage": advantage, "weight": 0.8, "loss_scale": 0.5}
            if gap is not None:
                token["ref"] = logprob + gap
            truth_options = {**options, "dual_clip": dual or None}
            truth = exact(row, 5, token, options=truth_options)[2]
            got = emulate(emulator, row, 5, 2, token, options=options)[2]
            torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
            seen += bool((truth != 0).any())
    assert 100 < seen < 720
    truth = exact(row, 5, {"advantage": 1.0})[2]
    got = emulate(emulator, row, 5, 1, {"advantage": 1.0})[2]
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


def test_unbiased_kl(emulator: Any) -> None:
    """Fails if the ratio does not multiply the KL and its gradient, or where it is clamped."""
    row = offset_row(40, torch.float32, 1)
    logprob = exact(row, 5, {})[0]
    for old, kl, gap in itertools.product((-30.0, -1.0, 0.3, 30.0), (1, 2, 3), (-0.3, 0.5, 25.0)):
        options = {**OPTIONS, "kl": f"k{kl}", "unbiased_kl": True}
        token = {"old": logprob - old, "advantage": -1.5, "weight": 0.8, "ref": logprob + gap}
        truth = exact(row, 5, token, options=options)[2]
        got = emulate(emulator, row, 5, 2, token, options=options)[2]
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


def test_every_branch_of_cispo(emulator: Any) -> None:
    """Fails if a ratio within or outside the bounds, KL or the clamp differ from the specification.

    With an advantage every token has a gradient, whatever its ratio.
    """
    row = offset_row(40, torch.float32, 1)
    logprob = exact(row, 5, {})[0]
    distances = (None, -30.0, -1.0, -0.1, 0.0, 0.1, 0.24, 0.26, 1.0, 30.0)
    for distance, advantage, low, gap in itertools.product(
        distances, (-1.5, 0.0, 2.0), (0.2, 1.0), (None, -0.3, 25.0)
    ):
        options = {**CISPO, "clip_low": low}
        token = {"advantage": advantage, "weight": 0.8, "loss_scale": 0.5}
        if distance is not None:
            token["old"] = logprob - distance
        if gap is not None:
            token["ref"] = logprob + gap
        truth = exact(row, 5, token, options=options)[2]
        got = emulate(emulator, row, 5, 2, token, options=options)[2]
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-13)
        assert advantage == 0 or (got != 0).any()
    token = {"old": math.nan, "advantage": 1.0}
    assert emulate(emulator, row, 5, 2, token, options=CISPO)[2].isnan().all()


def test_edge_rows(emulator: Any) -> None:
    """Fails if -inf, an all -inf row, a large offset, NaN or +inf is not what the contract says."""
    base = offset_row(5000, torch.float32, 3)
    base[:4000] = -math.inf
    check(emulator, base.clone(), 4500, 4)
    check(emulator, torch.randn(5000) + 3000, 17, 2)
    check(emulator, torch.randn(5000) - 150, 17, 2)
    token = {"old": -3.0, "advantage": 1.0}
    for label in (0, 4999):
        dead = torch.full((5000,), -math.inf)
        logprob, entropy, gradient = emulate(emulator, dead, label, 4, token)
        assert (logprob, entropy) == (-math.inf, 0.0) and (gradient == 0).all()
    logprob, entropy, gradient = emulate(emulator, base, 4500, 4, {"advantage": 0.0})
    assert (gradient == 0).all() and math.isfinite(logprob)
    banned = emulate(emulator, base, 3, 4, {**token, "old": -1.0})
    assert banned[0] == -math.inf and (banned[2] == 0).all()
    for bad in (math.nan, math.inf):
        for where in (0, 2500, 4999):
            row = torch.randn(5000)
            row[where] = bad
            logprob, entropy, gradient = emulate(emulator, row, 17, 4, token)
            assert math.isnan(logprob) and math.isnan(entropy) and gradient.isnan().all()


def test_temperatures_of_a_row(emulator: Any) -> None:
    """Fails if a row's temperature of 0 is not the limit, or a bad one gives a plausible number."""
    row = torch.tensor([1.0, 3.0, 3.0, -math.inf, 2.9])
    token = {"old": -1.0, "advantage": 1.0}
    for label, logprob in ((1, -math.log(2)), (0, -math.inf), (3, -math.inf)):
        got = emulate(emulator, row, label, 2, token, 0.0)
        assert got[:2] == pytest.approx((logprob, math.log(2))) and (got[2] == 0).all()
    for tiny in (1e-30, 1e-42):
        got = emulate(emulator, row, 1, 2, token, tiny)
        assert got[:2] == pytest.approx((-math.log(2), math.log(2)))
    for bad in (-1.0, math.nan, math.inf):
        logprob, entropy, gradient = emulate(emulator, row, 1, 2, token, bad)
        assert math.isnan(logprob) and math.isnan(entropy) and gradient.isnan().all()


# ---- machine code --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    target = tmp_path_factory.mktemp("cubin") / "kernel.cubin"
    command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-arch=sm_90a", "-Werror=all-warnings"]
    subprocess.run([*command, "-o", str(target), str(SOURCE)], check=True)
    return target


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [str(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_five_blocks_fit_a_multiprocessor(cubin: Path) -> None:
    """Fails if registers spill, or leave no room for the blocks that hide latency."""
    report = cuobjdump("--dump-resource-usage", str(cubin))
    kernels = [
        {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for line in report.splitlines()
        if "REG:" in line
    ]
    assert len(kernels) == len(DTYPES)
    for usage in kernels:
        assert usage["STACK"] == usage["LOCAL"] == 0, usage
        assert usage["REG"] * 128 * 5 <= 65536, usage
        # A fifth of 228 kB, less what the system takes and the states that warps and blocks
        # exchange, holds an eighth of 152,064 bfloat16 logits.
        assert 5 * (152_064 // 8 // 8 * 16 + (4 + 8) * 16 + usage["SHARED"]) <= 228 * 1024


def test_the_row_moves_in_16_byte_pieces(cubin: Path) -> None:
    """Fails if the main loops load or store narrowly, or touch local memory."""
    for code in cuobjdump("-sass", str(cubin)).split("Function :")[1:]:
        opcodes = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:\.[A-Z0-9_]+)+", code))
        copies = {opcode for opcode in opcodes if opcode.startswith("LDGSTS")}
        assert copies == {"LDGSTS.E.BYPASS.128"}, copies
        assert "STG.E.128" in opcodes and "LDS.128" in opcodes
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))]
        assert "UCGABAR_ARV" in code and "UCGABAR_WAIT" in code
        rounding = [opcode for opcode in opcodes if opcode.startswith("F2FP")]
        assert not [opcode for opcode in rounding if ".RZ" in opcode]
