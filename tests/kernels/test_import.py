"""Modules that `import r1v3.kernels` brings along."""

import subprocess
import sys

import pytest
import torch

from r1v3 import kernels
from r1v3.kernels import cpu

CHECK = """
import sys
import r1v3.kernels
for name in ("megatron", "transformers", "vllm", "pydantic", "r1v3.trainer", "r1v3.model"):
    assert name not in sys.modules, name
names = [n for n in dir(r1v3.kernels) if n in r1v3.kernels.__all__]
assert sorted(names) == sorted(r1v3.kernels.__all__) and len(names) == 10, names
"""


def test_importing_the_kernels_loads_nothing_else() -> None:
    """Fails if another stack that wants one kernel has to install a trainer's dependencies."""
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_without_the_compiled_kernels_results_are_the_same_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a build that was skipped is silent, or says so at every call, or breaks an op."""
    logits, ids = torch.randn(6, 40), torch.randint(0, 40, (6,))
    hidden, weight = torch.randn(6, 8), torch.randn(40, 8)
    mask, advantages = torch.ones(2, 3), torch.tensor([1.0, -1.0])

    def results() -> list[torch.Tensor]:
        x = logits.clone().requires_grad_()
        logprobs, entropy = kernels.logprobs_and_entropy(x, ids, temperature=0.7)
        loss, _ = kernels.grpo_loss(logprobs.view(2, 3), None, advantages, mask)
        (loss + entropy.sum()).backward()
        assert x.grad is not None
        return [
            x.grad,
            logprobs,
            entropy,
            kernels.entropy_from_logits(logits),
            kernels.selective_log_softmax(logits, ids),
            *kernels.linear_logprobs_and_entropy(hidden, weight, ids),
            kernels.linear_grpo_loss(
                hidden.view(2, 3, 8), weight, ids.view(2, 3), None, advantages, mask
            )[0],
            kernels.logits_grpo_loss(logits.view(2, 3, 40), ids.view(2, 3), None, advantages, mask)[
                0
            ],
            kernels.group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.25]), 2),
            kernels.ban_tokens_(logits.clone(), torch.tensor([3, 7])),
        ]

    compiled = results()
    monkeypatch.setattr(cpu, "_C", None)
    cpu._say_what_runs_instead.cache_clear()
    with pytest.warns(RuntimeWarning, match="without its compiled CPU kernels") as said:
        plain = results()
    assert len([each for each in said if "compiled" in str(each.message)]) == 1
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
