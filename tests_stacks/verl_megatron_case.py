"""verl's Megatron heads on two gloo ranks, stock against r1v3; every rank asserts, under torchrun.

Vocabulary-parallel logits go to the engine's `_lm_head_logits_processor`; hidden states and a shard
of the weight to `linear_cross_entropy`, for which the truth is float64 arithmetic.
"""

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.integrations import verl as adapter

TOKENS = 24
ENGINE = types.SimpleNamespace(
    engine_config=types.SimpleNamespace(
        entropy_from_logits_with_chunking=False, entropy_from_logits_chunk_size=2048
    )
)


def results(outputs: dict[str, Tensor], leaf: Tensor, up: Tensor) -> list[Tensor]:
    """Log-probabilities, entropies and the gradient of both by the leaf, in float64."""
    loss = (outputs["log_probs"] * up[0]).sum()
    if "entropy" in outputs:
        loss = loss + (outputs["entropy"] * up[1]).sum()
    loss.backward()
    assert leaf.grad is not None
    return [each.detach().double() for each in (*outputs.values(), leaf.grad)]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest error of a, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def truth(logits: Tensor, label: Tensor, temperature: Tensor, entropy: bool) -> dict[str, Tensor]:
    """The definition."""
    logs = (logits / temperature[..., None]).log_softmax(-1)
    out = {"log_probs": logs.gather(-1, label[..., None])[..., 0]}
    return {**out, "entropy": -(logs.exp() * logs).sum(-1)} if entropy else out


def check_logits(stock: Any, ours: Any, vocabulary: int, dtype: torch.dtype, entropy: bool) -> None:
    """Compare the two methods with float64, on the same shard."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    full = (torch.randn(1, TOKENS, vocabulary) * 3).to(dtype)
    label = torch.randint(0, vocabulary, (1, TOKENS))
    temperature = torch.rand(1, TOKENS) + 0.5
    up = torch.randn(2, 1, TOKENS)
    own = slice(rank * vocabulary // ranks, (rank + 1) * vocabulary // ranks)
    exact = full.double().requires_grad_()
    wanted = results(truth(exact, label, temperature.double(), entropy), exact, up)
    wanted[-1] = wanted[-1][..., own]
    errors = []
    for method in (stock, ours):
        leaf = full[..., own].contiguous().requires_grad_()
        outputs = method(
            ENGINE, leaf * 1, label.clone(), temperature.clone(), calculate_sum_pi_squared=False,
            calculate_entropy=entropy, distillation_use_topk=False, distillation_only=False,
            logits_processor_func=None, batch=None, data_format="thd",
        )  # fmt: skip
        outputs = {key: outputs[key] for key in ("log_probs", "entropy") if key in outputs}
        assert ("entropy" in outputs) == entropy
        found = results(outputs, leaf, up)
        errors.append([distance(a, b) for a, b in zip(found, wanted, strict=True)])
    limit = 2e-6 if dtype == torch.float32 else 8e-3
    for theirs, mine in zip(*errors, strict=True):
        assert mine < max(limit, 1.2 * theirs), (vocabulary, dtype, entropy, errors)


def check_fused(vocabulary: int) -> None:
    """Compare `linear_cross_entropy` over a tensor-parallel group with float64."""
    from megatron.core import parallel_state
    from verl.models.mcore import model_forward_fused

    rank, ranks = dist.get_rank(), dist.get_world_size()
    hidden, weight = torch.randn(TOKENS, 1, 16), torch.randn(vocabulary, 16)
    label = torch.randint(0, vocabulary, (1, TOKENS))
    up = torch.randn(2, TOKENS)
    own = slice(rank * vocabulary // ranks, (rank + 1) * vocabulary // ranks)
    x = hidden.double().requires_grad_()
    logits = x[:, 0] @ weight.double().T
    wanted = results(truth(logits, label[0], torch.full((TOKENS,), 0.8).double(), True), x, up)
    y = hidden.clone().requires_grad_()
    logprobs, entropy = model_forward_fused.linear_cross_entropy(
        y, weight[own].contiguous(), label, 0.8, "none",
        parallel_state.get_tensor_model_parallel_group(),
    )  # fmt: skip
    found = results({"log_probs": logprobs, "entropy": entropy}, y, up)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def main() -> None:
    """Run every case on this rank."""
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead as Engine

    stock = Engine._lm_head_logits_processor
    torch.manual_seed(1)
    with adapter.use_heads(megatron=True) as rebound:
        assert len(rebound.names) == 5
        ours = Engine._lm_head_logits_processor
        assert ours is not stock
        for vocabulary in (512, 5000):
            for dtype in (torch.float32, torch.bfloat16):
                for entropy in (True, False):
                    check_logits(stock, ours, vocabulary, dtype, entropy)
            check_fused(vocabulary)
    assert Engine._lm_head_logits_processor is stock
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
