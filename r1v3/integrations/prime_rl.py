"""r1v3 in prime-rl: the fused head of its trainer, and the clipped GRPO loss.

    from r1v3.integrations.prime_rl import use_head
    use_head()            # in the trainer's process, before its first step

The loss, which prime-rl does not have, in the trainer's configuration:

    [trainer.loss]
    type = "custom"
    import_path = "r1v3.integrations.prime_rl.policy_loss"
    kwargs = { clip_low = 0.2, clip_high = 0.28 }
"""

from typing import Any

from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import grpo_loss, linear_logprobs_and_entropy

_REPORTED = ("clip_low_fraction", "clip_high_fraction", "dual_clip_fraction", "approx_kl", "ref_kl")


def use_head() -> Rebound:
    """Let prime-rl's trainer score hidden states with `linear_logprobs_and_entropy`.

    It is used where the trainer has a chunk size for its head. Heads with a soft cap on the logits
    (Gemma) are another class, which stays.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: prime-rl is not installed.
        RuntimeError: this version of prime-rl has another head; names the versions.
    """
    return rebind(
        "prime-rl",
        [
            Name(
                "prime_rl.trainer.models.layers.lm_head",
                "FusedOutputLinear.forward",
                "self, hidden_states, labels, temperature",
                forward,
            )
        ],
    )


def forward(
    head: Any,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | None = None,
) -> dict[str, Tensor]:
    """In the place of `FusedOutputLinear.forward`.

    Args:
        hidden_states: [B, S, H]; labels: [B, S]; temperature: [B, S].

    Returns:
        "logprobs" and "entropy", [B, S] float32; both have gradients, prime-rl's entropy has none.

    Raises:
        ValueError: labels or temperature is None.
    """
    if labels is None or temperature is None:
        raise ValueError("the fused head needs labels and a temperature for every token")
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden_states, head.weight, labels, temperature=temperature
    )
    return {"logprobs": logprobs, "entropy": entropy}


def policy_loss(inputs: Any, *, kl_coef: float = 0.0, **options: Any) -> Any:
    """Clipped GRPO loss of one sample, summed over its tokens as prime-rl divides it.

    Args:
        inputs: prime-rl's `LossInputs`: log-probabilities, advantages and mask [S].
        kl_coef: weight of the KL to the reference.
        options: clip_low, clip_high, dual_clip, ratio_clip and kl of `grpo_loss`.

    Returns:
        prime-rl's `LossOutputs`.

    Raises:
        ValueError: kl_coef without reference log-probabilities, or with weights of the tokens,
            which prime-rl multiplies with the KL as well.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    if kl_coef and (inputs.ref_logprobs is None or inputs.loss_weights is not None):
        raise ValueError(
            "kl_coef needs ref_logprobs, and samples without loss_weights: the KL is not weighted"
        )
    loss, metrics = grpo_loss(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        ref_logprobs=inputs.ref_logprobs if kl_coef else None,
        kl_coef=kl_coef,
        aggregation="constant",
        normalizer=1.0,
        weights=inputs.loss_weights,
        cu_seqlens=inputs.loss_mask.new_tensor([0, inputs.loss_mask.shape[0]], dtype=int),
        **options,
    )
    return LossOutputs(loss=loss, metrics={name: metrics[name] for name in _REPORTED})
