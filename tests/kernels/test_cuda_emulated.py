"""The CUDA kernel's source, executed: results, races, memory it may not touch, planted faults."""

import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import cpu, logits_grpo_loss, reference
from tests.kernels.conftest import INTERPRETED
from tests.kernels.emulated import emulated, take_the_cuda_kernel

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "csrc/cuda/logits_grpo_loss.cu"
OPTIONS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.1, "kl": "k3"}
CODES = [0.2, 0.28, 0.0, 0.0, 0.1, 2.0, 0.0, 3.0]
CANARY = 12345.0
SLOW = pytest.mark.slow
pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing here is a Triton kernel")


@pytest.fixture(scope="module")
def device() -> Any:
    """The emulated one, prepared for launches as a caller prepares it."""
    module = emulated()
    for dtype in (0, 1):
        assert module.logits_grpo_loss_cluster(dtype, 1000) == 1
    return module


@dataclass
class Rows:
    """[n, width] logits or gradients as a view of larger memory, full of canaries elsewhere."""

    memory: Tensor
    view: Tensor

    @staticmethod
    def draw(draw: random.Random, n: int, width: int, dtype: torch.dtype) -> "Rows":
        stride, start = width + draw.choice([0, 1, 2, 3, 5, 8, 16]), draw.randrange(32)
        memory = torch.full((start + stride * n + 64,), CANARY, dtype=dtype)
        return Rows(memory, memory.as_strided((n, width), (stride, 1), start))

    @property
    def layout(self) -> list[int]:
        return [1, self.view.stride(0), self.view.stride(0)]

    def of_rows(self, values: Tensor) -> Tensor:
        """The same view of values of all the memory."""
        return values.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())

    def accesses(self, device: Any) -> tuple[Tensor, Tensor]:
        """Reads and writes of each element of the memory by the last launch."""
        units = self.memory.element_size() // 2
        counts = torch.zeros(2, self.memory.numel() * units, dtype=torch.uint8)
        pointers = [row.data_ptr() for row in counts]
        device.count_accesses(self.memory.data_ptr(), counts.shape[1], *pointers)
        reads, writes = counts.view(2, -1, units).amax(-1).unbind()
        return reads.clone(), writes.clone()


@dataclass
class Case:
    """Arguments of a launch, drawn at random."""

    logits: Rows
    gradient: Rows
    vocab: int
    ids: Tensor
    tokens: dict[str, Tensor]
    temperature: float | Tensor
    blocks: int

    @staticmethod
    def draw(seed: int, width: int, n: int, blocks: int | None = None) -> "Case":
        draw = random.Random(seed)
        dtype = draw.choice([torch.float32, torch.bfloat16])
        logits = Rows.draw(draw, n, width, dtype)
        x = draw.choice([0.1, 3.0, 20.0]) * torch.randn(n, width) + draw.choice([0, 300, -900])
        vocab = max(1, width - draw.choice([0, 0, 1, 3, 64]))
        for row in x:
            kind, where = draw.random(), draw.randrange(vocab)
            if kind < 0.3:
                row[torch.randint(width, (width // 3,))] = -math.inf
            elif kind < 0.35:
                row[:] = -math.inf
            elif kind < 0.45:
                row[where] = draw.choice([math.nan, math.inf])
        logits.view.copy_(x)
        ids = torch.randint(vocab, (n,))
        ids[::5] = draw.choice([-100, -1, vocab, 2**40, 0, vocab - 1])
        gradient = logits if draw.random() < 0.5 else Rows.draw(draw, n, width, dtype)
        case = Case(
            logits, gradient, vocab, ids, _tokens(draw, n), draw.choice([1.0, 0.6, 1.7]),
            blocks or draw.choice([1, 2, 4, 8]),
        )  # fmt: skip
        if draw.random() < 0.4:  # a temperature for each row
            case.temperature = 0.5 + torch.rand(n, dtype=torch.float64)
        return case

    def launch(self, device: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy; the gradient is written."""
        n, width = self.logits.view.shape
        results = torch.full((2, n), 777.0)
        number, more = cpu.temperature_arguments(self.temperature)
        names = ("loss_scale", "old_logprobs", "advantages", "weights", "ref_logprobs")
        device.logits_grpo_loss_cuda(
            logits=self.logits.view.data_ptr(), logits_layout=self.logits.layout,
            gradient=self.gradient.view.data_ptr(), gradient_layout=self.gradient.layout,
            dtype=cpu.DTYPE_CODES[self.logits.view.dtype], n_rows=n, width=width, vocab=self.vocab,
            token_ids=self.ids.data_ptr(), temperature=number, options=CODES, **more,
            logprobs=results[0].data_ptr(), entropy=results[1].data_ptr(), blocks=self.blocks,
            stream=0,
            **{name: self.tokens[name].data_ptr() if name in self.tokens else 0 for name in names},
        )  # fmt: skip
        return results[0], results[1]

    def specified(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropy and gradient by formulas of float64."""
        degrees = torch.as_tensor(self.temperature).reshape(-1, 1)
        x = self.logits.view.double()[:, : self.vocab] / degrees
        scale = self.tokens["loss_scale"].double()
        counted = (scale != 0) & (self.ids != reference.IGNORED_TOKEN)
        inside = (self.ids >= 0) & (self.ids < self.vocab)
        dead = (x == -math.inf).all(-1)
        logp = x.log_softmax(-1)
        p = logp.exp()
        entropy = -torch.where(p == 0, 0.0, p * logp).sum(-1)
        logprobs = logp.gather(-1, torch.where(inside, self.ids, 0)[:, None]).squeeze(-1)
        logprobs = torch.where(inside, torch.where(dead, -math.inf, logprobs), math.nan)
        rows = counted.nonzero().squeeze(-1)
        given = {name: value.double()[rows] for name, value in self.tokens.items()}
        slopes = torch.zeros_like(scale)
        slopes[rows] = scale[rows] * reference.grpo_loss(
            logprobs[rows], given.get("old_logprobs"), given["advantages"], torch.ones(len(rows)),
            torch.tensor([0, len(rows)]), ref_logprobs=given.get("ref_logprobs"),
            weights=given.get("weights"), aggregation="constant", normalizer=1.0, **OPTIONS,
        )[1]  # fmt: skip
        label = torch.zeros_like(p).scatter_(-1, torch.where(inside, self.ids, 0)[:, None], 1.0)
        gradient = torch.zeros_like(self.logits.view, dtype=torch.float64)
        gradient[:, : self.vocab] = (slopes / self.temperature)[:, None] * (label - p)
        gradient[dead | (slopes == 0)] = 0.0
        return (
            torch.where(counted, logprobs, 0.0),
            torch.where(counted, torch.where(dead, 0.0, entropy), 0.0),
            gradient,
        )

    def check(self, device: Any) -> None:
        """Launch, and compare results and memory with what they should be."""
        before, single = self.gradient.memory.clone(), self.logits.view.float()
        logprobs, entropy, gradient = self.specified()
        results = self.launch(device)
        outside = torch.ones_like(before, dtype=torch.bool)
        self.gradient.of_rows(outside).fill_(False)
        assert torch.equal(self.gradient.memory[outside], before[outside])
        coldest = float(torch.as_tensor(self.temperature).min())
        largest = single.nan_to_num(0, 0, 0).abs().max().item() / coldest
        for got, exact in zip(results, (logprobs, entropy), strict=True):
            torch.testing.assert_close(
                got.double(), exact, rtol=3e-6, atol=3e-5 + 2e-7 * largest, equal_nan=True
            )
        rounding = 2.0**-8 if self.logits.view.dtype == torch.bfloat16 else 1e-5
        slope = gradient.nan_to_num(0).abs().amax(-1, keepdim=True)
        error = (self.gradient.view.double() - gradient).nan_to_num(0).abs()
        # Where the label has nearly all the probability, 1 - p cancels.
        allowed = (rounding + 2e-4) * gradient.nan_to_num(0).abs() + 3e-6 * slope + 1e-9
        assert (error <= allowed).all()
        assert torch.equal(self.gradient.view.isnan(), gradient.isnan())


def _tokens(draw: random.Random, n: int) -> dict[str, Tensor]:
    """Terms of n tokens, some of which do not count and hold NaN."""
    tokens = {"loss_scale": torch.rand(n) + 0.1, "advantages": torch.randn(n)}
    if draw.random() < 0.7:
        tokens["old_logprobs"] = -torch.rand(n) * 9
    if draw.random() < 0.5:
        tokens["ref_logprobs"] = -torch.rand(n) * 9
    if draw.random() < 0.5:
        tokens["weights"] = torch.rand(n) * 2
    masked = torch.rand(n) < 0.2
    for name, value in tokens.items():
        value[masked] = 0.0 if name == "loss_scale" else math.nan
    return tokens


def check_drawn(seed: int, device: Any) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    few, some, many = draw.randrange(1, 40), draw.randrange(1, 3000), draw.randrange(8000, 30000)
    device.configure(seed=seed, clusters=draw.choice([1, 2, 3]))
    Case.draw(seed, draw.choice([few, some, many]), draw.choice([1, 2, 4])).check(device)


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=SLOW) for seed in range(6, 80))]
)
def test_any_row_in_any_order_of_threads(seed: int, device: Any) -> None:
    """Fails on a wrong result, a race, or a touch of memory outside the row, in some schedule.

    Rows start and end anywhere around a 16-byte boundary, in place or apart; logits are -inf, NaN
    or +inf; labels are outside the vocabulary, and masked tokens hold NaN.
    """
    check_drawn(seed, device)


@pytest.mark.parametrize(
    "width", [151_674, *(pytest.param(n, marks=SLOW) for n in (18_976, 151_936, 152_064))]
)
def test_rows_of_the_models(width: int, device: Any) -> None:
    """Fails at the lengths the kernel was written for, with the cluster that it asks for."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        device.configure(seed=seed)
        case = Case.draw(seed, width, 1)
        code = cpu.DTYPE_CODES[case.logits.view.dtype]
        case.blocks = device.logits_grpo_loss_cluster(code, case.vocab)
        case.check(device)


def test_bits_do_not_depend_on_the_order_of_threads(device: Any) -> None:
    """Fails if a sum is taken in the order in which threads arrive."""
    found = []
    for seed, clusters in ((1, 1), (2, 3), (3, 5)):
        torch.manual_seed(0)
        case = Case.draw(2, 3001, 5, blocks=4)
        device.configure(seed=seed, clusters=clusters)
        results = case.launch(device)
        found.append(torch.cat([*results, case.gradient.view.float().flatten()]).view(torch.int32))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_every_logit_is_read_once_and_its_gradient_written_once(device: Any) -> None:
    """Fails if memory traffic is more than the kernel is for, or goes beyond the row."""
    torch.manual_seed(0)
    device.configure(seed=7)
    for seed in range(4):
        case = Case.draw(seed, 2500 + seed, 3, blocks=4)
        case.ids = torch.randint(case.vocab, (3,))
        case.tokens["loss_scale"] = torch.tensor([0.5, 0.0, 0.2])
        if case.gradient is case.logits:
            case.gradient = Rows.draw(random.Random(seed), 3, 2500 + seed, case.logits.view.dtype)
        case.launch(device)
        reads, _ = case.logits.accesses(device)
        _, writes = case.gradient.accesses(device)
        read, written = case.logits.of_rows(reads), case.gradient.of_rows(writes)
        assert (read[0, : case.vocab] == 1).all() and (written == 1).all()
        assert (read[1] == 0).all(), "a token that does not count is read"
        assert read.sum() == reads.sum() and written.sum() == writes.sum()


# A primitive that does nothing, and what must be noticed.
MISSING = {
    "__syncthreads": "race",
    "cluster_barrier": "race",
    "wait_for_start": "which has not started",
    "wait_for_copies": "copies under way",
}


@pytest.mark.parametrize("primitive", MISSING)
def test_a_missing_barrier_is_noticed(primitive: str, device: Any) -> None:
    """Fails if the emulator, and so every test here, would not see such a fault in the kernel."""
    torch.manual_seed(0)
    for seed in range(8):
        device.configure(seed=seed, without=primitive)
        case = Case.draw(1, 5000, 1, blocks=4)
        case.tokens["loss_scale"] = torch.ones(1)
        case.ids = torch.zeros(1, dtype=torch.int64)
        try:
            case.launch(device)
        except RuntimeError as error:
            assert MISSING[primitive] in str(error)
            return
    pytest.fail(f"a kernel without {primitive} went through")


FAULTS = {
    "the last copies are not waited for": ("wait_for_copies<0>();", "wait_for_copies<1>();"),
    "the first copies are not waited for": ("wait_for_copies<3>();", ""),
    "blocks read each other's memory when they may have ended": (
        "  state = exchange.blocks[0];\n",
        "  state = *in_block(&exchange.blocks[0], blocks - 1);\n",
    ),
    "copies go past the slice": (
        "if (v < slice.count) copy_vector", "if (v < slice.count + 1) copy_vector",
    ),
    "the gradient's padding overlaps the row": (
        "fill_zero(out, a.vocab, a.width, rank, blocks);\n#endif",
        "fill_zero(out, a.vocab - 1, a.width, rank, blocks);\n#endif",
    ),
    "two threads write the same vectors": (
        "for (int v = threadIdx.x; v < slice.count; v += kThreads) {\n    float x",
        "for (int v = threadIdx.x / 2; v < slice.count; v += kThreads / 2) {\n    float x",
    ),
    "the slope is that of another label": ("result.logprob;\n", "result.logprob + 1;\n"),
}  # fmt: skip


@SLOW
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, tmp_path: Path, device: Any) -> None:
    """Fails if the kernel could have this fault and the tests above would pass."""
    from tests.kernels.emulator import build

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source, (old, new) = tmp_path / KERNEL, FAULTS[fault]
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    faulty = build.load(tmp_path)
    for dtype in (0, 1):
        faulty.logits_grpo_loss_cluster(dtype, 1000)
    with pytest.raises((RuntimeError, AssertionError)):
        for seed in range(12):
            check_drawn(seed, faulty)


# ---- from Python, and the host's side ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.8, [[0.8, 1.2, -1.0], [0.5, math.nan, 0.0]]], ids=str)
def test_the_public_function_takes_the_kernel(
    temperature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if Python hands an argument to the binding in another's place."""
    given = {
        "token_ids": torch.randint(700, (2, 3)),
        "old_logprobs": -6 - torch.rand(2, 3),
        "advantages": torch.randn(2),
        "loss_mask": torch.tensor([[True, True, False], [True, False, True]]),
        "ref_logprobs": -6 - torch.rand(2, 3),
        "weights": torch.rand(2) + 0.5,
        "temperature": torch.tensor(temperature) if temperature != 0.8 else 0.8,
        "vocab_size": 701,
        **OPTIONS,
    }
    logits = torch.randn(2, 3, 711)
    results = []
    for emulate in (False, True):
        with monkeypatch.context() as patch:
            module = take_the_cuda_kernel(patch) if emulate else None
            checked = module.accesses_checked() if module else 0
            leaf = logits.clone().requires_grad_()
            loss, metrics = logits_grpo_loss(leaf, **given)
            loss.backward()
            assert module is None or module.accesses_checked() > checked
        results.append({"loss": loss.detach(), "gradient": leaf.grad, **metrics})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize(("vocab", "blocks"), [(18_976, 1), (151_674, 8), (900_000, 8)])
def test_rows_get_the_blocks_they_need(vocab: int, blocks: int, device: Any) -> None:
    """Fails if a row gets too few blocks to hold it, or more than room for five needs."""
    assert device.logits_grpo_loss_cluster(1, vocab) == blocks


def test_a_row_that_is_too_long_is_refused(device: Any) -> None:
    """Fails if a launch is tried that no device can hold."""
    assert device.logits_grpo_loss_cluster(1, 2_000_000) == 0


def test_launches_of_two_host_threads_do_not_disturb_each_other(device: Any) -> None:
    """Fails if one thread's launch lowers the limit of shared memory under another's."""
    device.configure(seed=0)
    torch.manual_seed(0)
    whole, small = (Case.draw(3, width, 1, blocks=4) for width in (151_674, 20_000))
    for size in (20_000, 151_674):
        assert device.logits_grpo_loss_cluster(1, size) > 0
    device.interrupt_by(lambda: small.launch(device) and None)
    whole.launch(device)
    lanes = 16 // whole.logits.view.element_size()
    assert device.last_shared_bytes() >= -(-(whole.vocab // lanes) // 4) * 16
