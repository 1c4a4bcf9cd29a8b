"""Specializations that Triton compiles, from arguments of real launches. No GPU is needed."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from r1v3.kernels import (
    ban_tokens_,
    cpu,
    devices,
    group_advantages,
    grpo_loss,
    logits_grpo_loss,
    logprobs_and_entropy,
    sample_tokens,
)
from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
TEMPERATURES = (1.0, 0.9, 0.8, 0.35, 1.5)


Variants = dict[str, dict[str, Any]]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """Kernel name to the keys under which its code is kept, to that code; nothing is launched.

    The code is a function that compiles for the H100.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    found: Variants = defaultdict(dict)

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*arguments, **named)

        def compiled() -> bytes:
            parsed, *types = kernel._pack_args(backend, named, bound, specialization, options)
            source = ASTSource(kernel, *types)
            return triton.compile(source, target=target, options=parsed.__dict__).asm["cubin"]

        found[kernel.__name__][f"{specialization} {options}"] = compiled

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(devices, "runs_triton", lambda x: x.dtype in devices.HALF_OR_SINGLE)
    monkeypatch.setattr(cpu, "supports", lambda tensor: False)
    return found


@pytest.mark.parametrize(
    "vocab,dtype",
    [
        (151_674, torch.bfloat16),
        (152_064, torch.float32),
        pytest.param(151_674, torch.float32, marks=pytest.mark.slow),
        pytest.param(151_936, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(151_936, torch.float32, marks=pytest.mark.slow),
        pytest.param(152_064, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_main_loops_move_16_bytes(
    vocab: int, dtype: torch.dtype, variants: Variants, tmp_path: Path
) -> None:
    """Fails if the H100's code for a model's vocabulary loads or stores narrowly, or spills."""
    logits = torch.zeros(3, vocab, dtype=dtype, requires_grad=True)
    sum(logprobs_and_entropy(logits, torch.zeros(3, dtype=torch.int64))).sum().backward()
    for name in ("_row_statistics_kernel", "_row_gradient_kernel"):
        (compiled,) = variants[name].values()
        (tmp_path / name).write_bytes(compiled())
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        sass = subprocess.check_output([tool, "-sass", tmp_path / name], text=True)
        opcodes = re.findall(
            r"^\s+/\*\w+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE
        )
        # Rows are streamed with the hint to evict them first; their ends, in no main loop, are not.
        streamed = [opcode for opcode in opcodes if opcode.startswith("LDG.E.EF")]
        assert len(streamed) >= 2 and all(".128" in opcode for opcode in streamed), streamed
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))]
        assert "STG.E.128" in opcodes or name == "_row_statistics_kernel"


@pytest.mark.parametrize("vocab", [151_674, 152_064])
def test_rows_and_temperatures_compile_nothing_again(vocab: int, variants: Variants) -> None:
    """Fails if a kernel is compiled again, which takes seconds, for another number of rows."""
    for rows, temperature in zip((1, 3, 16, 33, 40), TEMPERATURES, strict=True):
        logits = torch.zeros(2, rows, vocab, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(2, rows, dtype=torch.int64)
        sum(logprobs_and_entropy(logits, ids, temperature=temperature)).sum().backward()
        ban_tokens_(logits.detach(), ids[0, :1])
        sample_tokens(logits.detach(), ids + 0.5, temperature=temperature, banned=ids[0, :1])
    assert {name: len(keys) for name, keys in variants.items()} == {
        "_row_statistics_kernel": 1,
        "_merge_kernel": 1,
        "_row_gradient_kernel": 1,
        "_ban_tokens_kernel": 1,
        "_sample_statistics_kernel": 1,
        "_sample_merge_kernel": 1,
        "_sample_choose_kernel": 1,
    }


def test_batches_of_tokens_compile_nothing_again(variants: Variants) -> None:
    """Fails if the loss is compiled again for other batches.

    Triton tells numbers that 16 divides from others; all these lengths are such.
    """
    for rows, length in ((1, 96), (3, 160), (16, 544), (40, 1056), (2, 16_384)):
        tokens, mask = torch.zeros(rows, length), torch.ones(rows, length, dtype=torch.bool)
        grpo_loss(tokens, tokens, torch.ones(rows), mask)
        group_advantages(torch.zeros(16 * rows), 16)
    assert {name: len(keys) for name, keys in variants.items()} == {
        "_grpo_loss_kernel": 1,
        "_group_advantages_kernel": 1,
    }


def test_the_loss_of_logits_compiles_each_kernel_once(variants: Variants) -> None:
    """Fails if one of the kernels under `logits_grpo_loss` is compiled again for other lengths."""
    for length, temperature in zip((16, 48, 80, 112, 2048), TEMPERATURES, strict=True):
        logits, ids = torch.zeros(1, length, 64), torch.zeros(1, length, dtype=torch.int64)
        loss, _ = logits_grpo_loss(
            logits.requires_grad_(), ids, None, torch.ones(1), ids == 0, temperature=temperature
        )
        (2 * loss).backward()
    names = "_row_statistics _merge _row_gradient _scale _token_terms".split()
    assert {name: len(variants[f"{name}_kernel"]) for name in names} == dict.fromkeys(names, 1)
    assert len(variants["_grpo_loss_kernel"]) == 2  # slopes with a share of 1, then the loss


def test_lengths_of_one_compile(variants: Variants) -> None:
    """Fails where a 1, which Triton makes a constant of, does not compile as a number."""
    tokens, mask = torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)
    grpo_loss(tokens, tokens, torch.ones(3), mask)
    for groups in (1, [1, 2], torch.tensor([0, 1, 1])):
        group_advantages(torch.zeros(3), groups, scale="none")
    assert len(variants["_grpo_loss_kernel"]) == 1
    assert len(variants["_group_advantages_kernel"]) == 3
    for codes in variants.values():
        for compiled in codes.values():
            compiled()
