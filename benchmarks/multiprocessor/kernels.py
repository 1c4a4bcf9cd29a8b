"""The kernels over logits, compiled ahead of time for an architecture."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.multiprocessor import sass
from benchmarks.multiprocessor.model import RESERVED, SHARED, Block
from benchmarks.multiprocessor.reading import Compiled, one_pass, part_of_row, streamed_row

ROOT = Path(__file__).resolve().parents[2]
ROW_INTEGERS = "n_rows base out_base inner vocab width vocab_start".split()
BFLOAT16, VECTOR = 2, 16  # bytes
# Of csrc/cuda: threads of a block, bytes of its states, blocks of a multiprocessor, of a cluster.
ONE_PASS_THREADS, ONE_PASS_STATES, ONE_PASS_RESIDENT, CLUSTERS = 128, 192, 5, (1, 2, 4, 8)


@dataclass(frozen=True)
class Modelled:
    """A kernel on rows of `vocab` bfloat16 logits."""

    name: str
    vocab: int
    kernel: Compiled
    block: Block


def compile_triton(kernel: Any, target: int, arguments: dict[str, Any], warps: int) -> Any:
    """Compile for given argument types ("*bf16:16" is a 16-byte aligned pointer) and constants.

    64-bit integers are not assumed divisible by anything: V = 151,674 must be served.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if value is None and (name in ROW_INTEGERS or "stride" in name):
            value = "i64"
        if isinstance(value, str):
            signature[name], _, aligned = value.partition(":")
            if aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(position,)] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps}
    )


def statistics_arguments(dtype: str, align: int, sharded: bool = False) -> dict[str, Any]:
    """Argument types and constants of the kernel of row statistics."""
    from r1v3.kernels.triton import logits_statistics

    return {
        "x_ptr": f"*{dtype}:16", "rows_ptr": "*i64:16" if sharded else None,
        "ids_ptr": "*i64:16", "shard_ptr": "*i64:16" if sharded else None,
        "stats_ptr": "*fp32:16", "temperature": "fp32", "parts": "i32", "HAS_ROWS": sharded,
        "HAS_IDS": True, "HAS_KEEP": sharded, "keep_ptr": "*u8:16" if sharded else None,
        "HAS_SHARD": sharded, "ALIGN": align, "VECTORS": logits_statistics.VECTORS,
        "PART_BLOCKS": logits_statistics.PART_BLOCKS, "temperatures_ptr": None,
        "HAS_TEMPERATURES": False,
    }  # fmt: skip


def gradient_arguments(dtype: str, align: int, sharded: bool = False) -> dict[str, Any]:
    """Argument types and constants of the kernel of the logits' gradient."""
    from r1v3.kernels.triton import logits_gradient

    return {
        "x_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16", "ids_ptr": "*i64:16",
        "slots_ptr": "*i64:16" if sharded else None, "shard_ptr": "*i64:16" if sharded else None,
        "saved_ptr": "*fp32:16", "grad_logprobs_ptr": "*fp32:16", "grad_entropy_ptr": "*fp32:16",
        "temperature": "fp32", "parts": "i32", "HAS_SLOTS": sharded, "HAS_IDS": True,
        "HAS_SHARD": sharded, "HAS_LOGPROBS": True, "HAS_ENTROPY": True, "ALIGN": align,
        "OUT_ALIGN": align, "VECTORS": logits_gradient.VECTORS,
        "PART_BLOCKS": logits_gradient.PART_BLOCKS, "temperatures_ptr": None,
        "HAS_TEMPERATURES": False, "inverse_softcap": "fp32", "HAS_SOFTCAP": False,
    }  # fmt: skip


def modelled(architecture: str, vocabularies: list[int]) -> Iterator[Modelled]:
    """Every kernel on every vocabulary; the one-pass kernel only where nvcc is on PATH."""
    from r1v3.kernels.triton import logits_gradient, logits_statistics

    target = int(architecture)
    module: Any = logits_statistics
    binary = compile_triton(
        module._row_statistics_kernel, target, statistics_arguments("bf16", 8), module.WARPS
    )
    (compiled,) = read_binary(binary.asm["cubin"], module.WARPS * 32)
    for vocab in vocabularies:
        blocks, rest = divmod(vocab * BFLOAT16, module.VECTORS * VECTOR)
        starts = range(0, max(blocks, 1), module.PART_BLOCKS)
        parts = [min(module.PART_BLOCKS, blocks - start) for start in starts]
        yield Modelled("row statistics", vocab, compiled, streamed_row(compiled, parts, rest))
    module = logits_gradient
    binary = compile_triton(
        module._row_gradient_kernel, target, gradient_arguments("bf16", 8), module.WARPS
    )
    (compiled,) = read_binary(binary.asm["cubin"], module.WARPS * 32)
    for vocab in vocabularies:
        vectors = vocab * BFLOAT16 // VECTOR
        count = max(1, -(-(vectors // module.VECTORS) // module.PART_BLOCKS))
        ends = -(-(vectors % module.VECTORS) // module.VECTORS) / count
        part = vocab * BFLOAT16 / count
        yield Modelled("row gradient", vocab, compiled, part_of_row(compiled, part, part, ends))
    if shutil.which("nvcc"):
        for vocab in vocabularies:
            yield _one_pass(architecture, vocab)


def _one_pass(architecture: str, vocab: int) -> Modelled:
    row = vocab * BFLOAT16
    shared, blocks = next(
        (shared, blocks)
        for resident in range(ONE_PASS_RESIDENT, 0, -1)
        for blocks in CLUSTERS
        if ((shared := ONE_PASS_STATES + row // blocks) + RESERVED) * resident <= SHARED
    )
    compiled = read_binary(_cuda_binary(architecture), ONE_PASS_THREADS, "bf16", shared)[0]
    return Modelled(f"one pass, {blocks} blocks", vocab, compiled, one_pass(compiled, row, blocks))


@cache
def _cuda_binary(architecture: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        source = ROOT / "csrc/cuda/logits_grpo_loss.cu"
        command = ["nvcc", "-O3", "-std=c++17", "-cubin", f"-arch=sm_{architecture}a"]
        subprocess.run([*command, "-o", str(target), str(source)], check=True)
        return target.read_bytes()


def read_binary(binary: bytes, threads: int, name: str = "", shared: int = 0) -> list[Compiled]:
    """The kernels of a cubin whose names hold `name`, launched with so much shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        code = sass.parse(_cuobjdump("-sass", path))
        usage = _cuobjdump("-res-usage", path)
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
    return [
        Compiled(instructions, int(registers[function]), threads, shared)
        for function, instructions in code.items() if name in function
    ]  # fmt: skip


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
