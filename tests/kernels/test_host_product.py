"""The host kernel that multiplies bfloat16 with float32 results."""

import pytest
import torch

from r1v3.kernels import host

pytestmark = pytest.mark.skipif(
    not host.multiplies(torch.bfloat16), reason="r1v3._C is not built, or no AVX-512 BF16"
)


@pytest.mark.parametrize("n,m,k", [(1, 1, 1), (14, 32, 2), (29, 77, 601), (100, 5, 7), (3, 200, 0)])
@pytest.mark.parametrize("add", [False, True])
def test_matches_float64(n: int, m: int, k: int, add: bool) -> None:
    """Fails for an edge of a panel, an odd k, a stride, or a sum in less than float32."""
    torch.manual_seed(0)
    rows, columns = torch.randn(n, k + 3).bfloat16(), torch.randn(m + 1, k).bfloat16()
    wide = torch.randn(n, m + 6)
    for a, b in (
        (rows[:, :k], columns[:m].T),
        (rows[:, :k].T.contiguous().T, columns[:m].T.contiguous()),
    ):
        out = wide.clone()
        host.product(a, b, out[:, 2 : m + 2], add=add)
        want = wide.double()
        exact = a.double() @ b.double()
        want[:, 2 : m + 2] = exact + (want[:, 2 : m + 2] if add else 0)
        torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=2e-7 * max(k, 1))
        assert torch.equal(out[:, :2], wide[:, :2]) and torch.equal(
            out[:, m + 2 :], wide[:, m + 2 :]
        )


def test_infinity_and_nan_stay_in_their_row() -> None:
    """Fails if padding multiplies infinity by 0, or a NaN reaches another row."""
    a, b = torch.ones(3, 5).bfloat16(), torch.ones(5, 3).bfloat16()
    a[0, 4], a[1, 0] = torch.inf, torch.nan
    out = torch.empty(3, 3)
    host.product(a, b, out, add=False)
    assert (out[0] == torch.inf).all() and out[1].isnan().all() and (out[2] == 5).all()


def test_bits_do_not_depend_on_place_or_threads() -> None:
    """Fails if a row's result changes with its place, its company or the number of threads."""
    torch.manual_seed(0)
    a, b = torch.randn(300, 700).bfloat16(), torch.randn(700, 400).bfloat16()
    whole, part = torch.empty(300, 400), torch.empty(7, 400)
    rows = torch.tensor([299, 3, 150, 0, 31, 77, 200])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        host.product(a, b, whole, add=False)
        torch.set_num_threads(1)
        host.product(a[rows], b, part, add=False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[rows], part)
