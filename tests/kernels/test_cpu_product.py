"""The CPU kernels that multiply float32 and bfloat16 with float32 results."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from r1v3.kernels import cpu

CODES = {torch.float32: 0, torch.bfloat16: 1}
KERNELS = [
    (dtypes, capability)
    for capability in (cpu._C.cpu_capabilities() if cpu.built() else ())
    if cpu._C.has_gemm(0, capability)
    for dtypes in product(CODES, CODES)
]
pytestmark = pytest.mark.skipif(not KERNELS, reason="r1v3._C is not built, or only portably")
every_kernel = pytest.mark.parametrize(
    "dtypes,capability",
    KERNELS,
    ids=[f"{capability}-{a}-{b}" for (a, b), capability in KERNELS],
)
Dtypes = tuple[torch.dtype, torch.dtype]


def layouts(n: int, m: int, k: int, dtypes: Dtypes) -> Iterator[tuple[Tensor, Tensor]]:
    """a [n, k] and b [k, m] in every order of strides, at odd addresses."""
    rows, columns = (
        torch.randn(n, k + 3).to(dtypes[0])[:, 1 : k + 1],
        torch.randn(m + 1, k).to(dtypes[1])[1:],
    )
    sparse_a = torch.randn(2 * n, 3 * k).to(dtypes[0])[::2, ::3]
    sparse_b = torch.randn(2 * k, 3 * m).to(dtypes[1])[::2, ::3]
    for a in (rows, rows.T.contiguous().T, sparse_a):
        for b in (columns.T, columns.T.contiguous(), sparse_b):
            yield a, b


@every_kernel
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    "n,m,k",
    [(1, 1, 1), (14, 32, 2), (29, 77, 601), (100, 5, 7), (3, 200, 0), (15, 16, 31), (33, 48, 1050)],
)
def test_matches_float64(
    n: int, m: int, k: int, add: bool, dtypes: Dtypes, capability: str
) -> None:
    """Fails for an edge of a panel or block, an odd k, a stride, or sums in less than float32."""
    torch.manual_seed(0)
    wide = torch.randn(n, m + 6)
    for a, b in layouts(n, m, k, dtypes):
        out = wide.clone()
        cpu.product(a, b, out[:, 3 : m + 3], add=add, capability=capability)
        want = wide.double()
        want[:, 3 : m + 3] = a.double() @ b.double() + (want[:, 3 : m + 3] if add else 0)
        torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=2e-7 * max(k, 1))
        rest = [0, 1, 2, m + 3, m + 4, m + 5]
        assert torch.equal(out[:, rest], wide[:, rest]), "written outside"


@every_kernel
def test_infinity_and_nan_stay_in_their_row(dtypes: Dtypes, capability: str) -> None:
    """Fails if padding multiplies infinity by 0, or a NaN reaches another row."""
    a, b = torch.ones(3, 5).to(dtypes[0]), torch.ones(5, 3).to(dtypes[1])
    a[0, 4], a[1, 0] = torch.inf, torch.nan
    out = torch.empty(3, 3)
    cpu.product(a, b, out, add=False, capability=capability)
    assert (out[0] == torch.inf).all() and out[1].isnan().all() and (out[2] == 5).all()


@every_kernel
def test_bits_do_not_depend_on_place_or_threads(dtypes: Dtypes, capability: str) -> None:
    """Fails if a row's result changes with its place, its company or the number of threads.

    Of 300 rows the other operand is copied, of 7 and 1 the rows are.
    """
    torch.manual_seed(0)
    a, b = torch.randn(500, 700).to(dtypes[0]), torch.randn(700, 400).to(dtypes[1])
    whole = torch.empty(500, 400)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cpu.product(a, b, whole, add=False, capability=capability)
        torch.set_num_threads(1)
        for rows in ([299, 3, 150, 0, 31, 77, 200], [499], list(range(450))):
            part = torch.empty(len(rows), 400)
            cpu.product(a[rows], b, part, add=False, capability=capability)
            assert torch.equal(whole[rows], part)
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_beside_float32_is_converted_exactly() -> None:
    """Fails if a bfloat16 operand gives other bits than its float32 copy."""
    a, b = torch.randn(29, 601).bfloat16(), torch.randn(601, 77)
    for capability in {capability for _, capability in KERNELS}:
        for x, y in ((a, b), (b.T.bfloat16(), a.T.float())):
            mixed, same = torch.empty(2, x.shape[0], y.shape[1])
            cpu.product(x, y, mixed, add=False, capability=capability)
            cpu.product(x.float(), y, same, add=False, capability=capability)
            assert torch.equal(mixed, same)


def test_a_dtype_without_a_kernel_raises() -> None:
    """Fails if float16 is multiplied as if it were something else."""
    assert not cpu.multiplies(torch.float16) and not cpu.multiplies(torch.float64)
    x = torch.ones(2, 2).half()
    with pytest.raises(ValueError, match="dtype must be one for which has_gemm is true"):
        cpu.product(x, x, torch.empty(2, 2), add=False)
