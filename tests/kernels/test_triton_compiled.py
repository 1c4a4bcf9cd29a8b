"""Every Triton kernel, compiled ahead of time for A100, H100 and B200. No GPU is needed."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.multiprocessor.kernels import (
    compile_triton,
    gradient_arguments,
    statistics_arguments,
)
from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

TARGETS = [80, 90, 100]


def advantage_arguments(of_one_length: bool) -> dict[str, Any]:
    f, i = "*fp32:16", None if of_one_length else "*i64:16"
    return {
        "rewards_ptr": f, "order_ptr": i, "offsets_ptr": i, "length": "i64",
        "batch_std_ptr": None, "out_ptr": f, "eps": "fp32", "HAS_ORDER": not of_one_length,
        "HAS_OFFSETS": not of_one_length, "BASELINE": 1, "SCALE": 0, "RAW_SINGLETON": False,
        "DDOF": 1, "BLOCK": 512,
    }  # fmt: skip


def loss_arguments(padded: bool) -> dict[str, Any]:
    from r1v3.kernels.triton import grpo_loss

    f, u = "*fp32:16", "*u8:16"
    return {
        "logprobs_ptr": f, "old_ptr": f, "advantages_ptr": f, "mask_ptr": u, "ref_ptr": f,
        "weights_ptr": f, "offsets_ptr": None if padded else "*i64:16", "length": "i64",
        "normalizer_ptr": f, "gradient_ptr": f,
        "sums_ptr": "*fp64:16", "loss_ptr": f, "metrics_ptr": f, "inverse_ptr": f,
        "ticket_ptr": "*i32:16", "tokens": "i64", "sequences": "i32", "parts": "i32",
        "clip_low": "fp32", "clip_high": "fp32", "dual_clip": "fp32", "kl_coef": "fp32",
        "HAS_OFFSETS": not padded, "HAS_OLD": True, "HAS_REF": True, "HAS_WEIGHTS": True,
        "HAS_NORMALIZER": True, "TOKEN_ADVANTAGES": True, "TOKEN_WEIGHTS": True, "POLICY": 1,
        "PENALTY": True, "KL": 2, "AGGREGATION": 0, "BLOCK": grpo_loss.BLOCK,
        "MASK_BLOCK": grpo_loss.MASK_BLOCK,
    }  # fmt: skip


def token_arguments(padded: bool) -> dict[str, Any]:
    from r1v3.kernels.triton import token_terms

    f, u = "*fp32:16", "*u8:16"
    return {
        "mask_ptr": u, "advantages_ptr": f, "weights_ptr": f,
        "offsets_ptr": None if padded else "*i64:16", "length": "i64", "normalizer_ptr": f,
        "counted_ptr": u, "scale_ptr": f, "token_advantages_ptr": f, "token_weights_ptr": f,
        "tokens": "i64", "sequences": "i32", "parts": "i32", "HAS_OFFSETS": not padded,
        "HAS_ADVANTAGES": True, "HAS_WEIGHTS": True, "BY_SEQUENCE": True,
        "BLOCK": token_terms.BLOCK, "MASK_BLOCK": token_terms.MASK_BLOCK,
    }  # fmt: skip


def sampling_arguments() -> dict[str, Any]:
    """Of all three kernels, with everything they can be given."""
    from r1v3.kernels.triton import sample_tokens

    d, i, u = "*fp64:16", "*i64:16", "*u8:16"
    return {
        "x_ptr": "*bf16:16", "mask_ptr": u, "enabled_ptr": u, "floor_ptr": d, "temperature_ptr": d,
        "shard_ptr": i, "stats_ptr": d, "merged_ptr": d, "rows_ptr": d, "uniforms_ptr": d,
        "forced_ptr": i, "tokens_ptr": i, "logprobs_ptr": "*fp32:16", "entropy_ptr": "*fp32:16",
        "parts": "i32", "ranks": "i32", "rank": "i32", "HAS_BAN": True, "HAS_ENABLED": True,
        "HAS_FLOOR": True, "HAS_SHARD": True, "HAS_FORCED": True, "BLOCK": sample_tokens.BLOCK,
        "PARTS": 128, "RANKS": 8,
    }  # fmt: skip


def kernels() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Name to (kernel, arguments, warps as launched)."""
    from r1v3.kernels.triton import ban_tokens, sample_tokens, scale, softcap
    from r1v3.kernels.triton.group_advantages import _group_advantages_kernel
    from r1v3.kernels.triton.grpo_loss import _grpo_loss_kernel
    from r1v3.kernels.triton.logits_gradient import _row_gradient_kernel
    from r1v3.kernels.triton.logits_statistics import _merge_kernel, _row_statistics_kernel
    from r1v3.kernels.triton.token_terms import _token_terms_kernel

    drawing = sampling_arguments()
    f, i, u = "*fp32:16", "*i64:16", "*u8:16"
    merge = {
        "stats_ptr": f, "ids_ptr": i, "shard_ptr": i, "merged_ptr": None, "logprobs_ptr": f,
        "entropy_ptr": f, "saved_ptr": f, "temperature": "fp32", "parts": "i32", "FINAL": True,
        "HAS_IDS": True, "HAS_SHARD": True, "PARTS": 32, "ROWS": 16,
        "temperatures_ptr": None, "HAS_TEMPERATURES": False,
    }  # fmt: skip
    by_row = {"temperatures_ptr": "*fp64:16", "HAS_TEMPERATURES": True}
    scaling = {"x_ptr": "*bf16:16", "factor_ptr": f, "n": "i64", "programs": "i64",
               "BLOCK": scale.BLOCK}  # fmt: skip
    capping = {"x_ptr": f, "stride": "i64", "columns": "i64", "blocks": "i32", "softcap": "fp32",
               "BLOCK": softcap.BLOCK}  # fmt: skip
    ban = {
        "logits_ptr": "*bf16:16", "ids_ptr": i, "enabled_ptr": u, "n_ids": "i32",
        "blocks": "i32", "HAS_ENABLED": True, "BLOCK": ban_tokens.BLOCK,
    }  # fmt: skip
    return {
        "statistics bf16": (_row_statistics_kernel, statistics_arguments("bf16", 8), 4),
        "statistics fp32": (_row_statistics_kernel, statistics_arguments("fp32", 4), 4),
        "statistics by row": (
            _row_statistics_kernel,
            {**statistics_arguments("bf16", 8), **by_row},
            4,
        ),
        "statistics shard": (_row_statistics_kernel, statistics_arguments("fp16", 8, True), 4),
        "gradient bf16": (_row_gradient_kernel, gradient_arguments("bf16", 8), 8),
        "gradient fp32": (_row_gradient_kernel, gradient_arguments("fp32", 4), 8),
        "gradient by row": (_row_gradient_kernel, {**gradient_arguments("bf16", 8), **by_row}, 8),
        "gradient capped": (
            _row_gradient_kernel,
            {**gradient_arguments("fp32", 4), "HAS_SOFTCAP": True},
            8,
        ),
        "gradient shard": (_row_gradient_kernel, gradient_arguments("fp16", 8, True), 8),
        "merge": (_merge_kernel, merge, 4),
        "merge by row": (_merge_kernel, {**merge, **by_row}, 4),
        "advantages": (_group_advantages_kernel, advantage_arguments(False), 4),
        "advantages of equal groups": (_group_advantages_kernel, advantage_arguments(True), 4),
        "loss": (_grpo_loss_kernel, loss_arguments(False), 4),
        "loss padded": (_grpo_loss_kernel, loss_arguments(True), 4),
        "loss cispo": (_grpo_loss_kernel, {**loss_arguments(False), "POLICY": 2}, 4),
        "token terms": (_token_terms_kernel, token_arguments(False), 4),
        "token terms padded": (_token_terms_kernel, token_arguments(True), 4),
        "ban": (ban_tokens._ban_tokens_kernel, ban, 1),
        "sample": (sample_tokens._sample_statistics_kernel, drawing, sample_tokens.WARPS),
        "sample merge": (sample_tokens._sample_merge_kernel, drawing, 4),
        "sample choose": (sample_tokens._sample_choose_kernel, drawing, sample_tokens.WARPS),
        "scale": (scale._scale_kernel, scaling, 8),
        "softcap": (softcap._softcap_kernel, capping, 8),
    }


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, LOCAL, ... as the cuobjdump that comes with Triton reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report.stdout)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", kernels() if not INTERPRETED else [])
def test_compiles_without_spills(name: str, target: int, tmp_path: Path) -> None:
    """Fails if a kernel does not compile for an architecture, or keeps registers in memory."""
    kernel, arguments, warps = kernels()[name]
    compiled = compile_triton(kernel, target, arguments, warps)
    usage = resource_usage(compiled.asm["cubin"], tmp_path)
    assert usage["LOCAL"] == 0 and usage["STACK"] == 0, usage
    # Two blocks of 256 threads must fit a multiprocessor, or loads cannot hide each other.
    assert usage["REG"] * warps * 32 * 2 <= 65536, usage


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype,align", [("bf16", 8), ("fp16", 8), ("fp32", 4)])
def test_main_loops_move_16_bytes_at_any_vocabulary(dtype: str, align: int, target: int) -> None:
    """Fails if rows of 151,674 logits, most of them off 16-byte boundaries, load narrowly."""
    from r1v3.kernels.triton.logits_gradient import _row_gradient_kernel
    from r1v3.kernels.triton.logits_statistics import _row_statistics_kernel

    for kernel, arguments, warps, stores in (
        (_row_statistics_kernel, statistics_arguments(dtype, align), 4, False),
        (_row_gradient_kernel, gradient_arguments(dtype, align), 8, True),
    ):
        ptx = compile_triton(kernel, target, arguments, warps).asm["ptx"]
        streaming = [
            line for line in ptx.splitlines() if "ld.global" in line and "evict_first" in line
        ]
        assert streaming and all(".v4.b32" in line for line in streaming), streaming
        if stores:
            assert "st.global.v4.b32" in ptx
            if dtype != "fp32":
                # The interpreter truncates, so only the code shows that a device rounds to nearest.
                narrowing = re.findall(r"cvt\.(\w+)(?:\.\w+)*\.f32\b", ptx)
                assert narrowing and set(narrowing) == {"rn"}, narrowing
