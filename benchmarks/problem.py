"""A benchmarked problem: inputs, the code that is compared, and the work that cannot be avoided."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Mode = Literal["forward", "backward", "forward+backward"]
Size = Literal["small", "full"]

SEED = 20250709
# InternVL3-38B's vocabulary: a bfloat16 row of it starts on a multiple of 4 bytes only.
VOCABULARY = 151_674


@dataclass(frozen=True)
class Problem:
    """One op on one set of inputs in one direction.

    Every function takes the inputs by name and returns a tuple of tensors.

    Attributes:
        dtype: of the largest input.
        inputs: arguments of every function.
        ours: the kernel under test.
        eager: what a PyTorch user writes; torch.compile gets the same function.
        reference: the specification. Run on float64 it is the truth, run on the inputs as they
            are it sets the error budget.
        upstream: gradients of the first outputs, for the modes with a backward; the other outputs
            are only compared.
        differentiated: names of the inputs that get a gradient.
        row_inputs: inputs whose first dimension counts rows that do not depend on each other,
            so that the truth can be computed a few rows at a time.
        mutated: inputs that the functions overwrite.
        restated: by label, what other projects run without kernels, written here in their form;
            they are timed whether or not these projects are installed.
        bytes_read, bytes_written: what any implementation must move, for memory-bound ops.
        flops: what any implementation must compute, for ops bound by a matrix product.
        tolerance: error that r1v3 may make beyond twice the reference's, where it is more than
            the rounding of the results.
    """

    op: str
    mode: Mode
    shape: dict[str, int]
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    ours: Function
    eager: Function
    reference: Function
    upstream: tuple[Tensor, ...] = ()
    differentiated: tuple[str, ...] = ()
    row_inputs: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    restated: dict[str, Function] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    tolerance: float = 0.0

    @property
    def title(self) -> str:
        """Such as "entropy forward, T=64 V=151674, bfloat16"."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {self.mode}, {sizes}, {str(self.dtype).removeprefix('torch.')}"


def random_logits(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """[rows, vocab] logits as a language model's: mostly noise, a few tokens far above it.

    The storage holds one row more, for rivals that insist on logits of [1, rows + 1, vocab].
    """
    generator = torch.Generator(device).manual_seed(SEED)
    storage = torch.empty(rows + 1, vocab, dtype=dtype, device=device)
    for row in storage:
        noise = torch.randn(vocab, generator=generator, device=device)
        favored = torch.randint(vocab, (16,), generator=generator, device=device)
        noise[favored] += 12.0
        row.copy_(2.0 * noise)
    return storage[:rows]


def random_ids(rows: int, vocab: int, device: str) -> Tensor:
    """int64 [rows] token ids."""
    generator = torch.Generator(device).manual_seed(SEED + 1)
    return torch.randint(vocab, (rows,), generator=generator, device=device)


def random_normal(*shape: int, device: str, seed: int = 2) -> Tensor:
    """Standard normal float32; `seed` tells tensors of one problem apart."""
    generator = torch.Generator(device).manual_seed(SEED + seed)
    return torch.randn(*shape, generator=generator, device=device)


def logits_shapes(device: str, size: Size) -> list[tuple[int, int]]:
    """(rows, vocabulary) of the ops on logits."""
    if device == "cpu":
        return [(64, VOCABULARY)] if size == "small" else [(64, VOCABULARY), (512, 151_936)]
    if size == "small":
        return [(64, VOCABULARY), (1024, VOCABULARY)]
    # The most telling first: the time may be over before the last. Rows of 151,674 start off
    # 16-byte boundaries; 151,936 is Qwen3's vocabulary, 152,064 Qwen2.5's, and 18,976 one of
    # eight tensor-parallel shards of InternVL3's.
    large = [(8192, vocab) for vocab in (VOCABULARY, 152_064, 18_976)]
    rest = [(rows, VOCABULARY) for rows in (1024, 64, 8, 1, 32_768)]
    return [*large, *rest, (8192, 151_936)]
