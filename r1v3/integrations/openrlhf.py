"""r1v3 in OpenRLHF: the log-probabilities and entropies of its actor, and a reward.

In every worker, by the runtime environment of the Ray job:

    ray job submit --runtime-env-json \
        '{"worker_process_setup_hook": "r1v3.integrations.openrlhf.use_head"}' -- ...

A reward, with the path of this file:

    --reward.remote_url .../r1v3/integrations/openrlhf.py

The losses are OpenRLHF's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from r1v3.integrations.rebinding import Name, Rebound, rebind
from r1v3.kernels import entropy_from_logits, selective_log_softmax


def use_head() -> Rebound:
    """Let OpenRLHF's actor read its logits with `selective_log_softmax` and `entropy_from_logits`.

    Returns:
        the names that were rebound, with `undo()`; also a context manager.

    Raises:
        ImportError: OpenRLHF is not installed.
        RuntimeError: this version of OpenRLHF has other heads; names the versions.
    """
    module = "openrlhf.models.actor"
    return rebind(
        "openrlhf",
        [
            Name(module, "log_probs_from_logits", "logits, labels, temperature", logprobs),
            Name(module, "compute_entropy", "logits", entropy),
        ],
    )


def logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """In the place of OpenRLHF's `log_probs_from_logits`.

    That divides the logits in place where it is given a temperature. The actor gives none: it has
    divided them itself before.

    Args:
        logits: [..., V], left as they are; labels: [...].

    Returns:
        [...] float32 (float64 for float64 logits).
    """
    return selective_log_softmax(logits, labels, temperature=temperature)


def entropy(logits: Tensor) -> Tensor:
    """In the place of OpenRLHF's `compute_entropy`: [...] float32 of logits [..., V]."""
    return entropy_from_logits(logits)


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]
) -> dict[str, object]:
    """Rewards of the report, under the name that OpenRLHF looks up in a reward's file.

    Args:
        queries: prompts and completions as one text. Where a query does not begin with its prompt,
            as with pictures, all of it is graded.
        labels: the true answers.

    Returns:
        "rewards" and "scores", 0.8 accuracy + 0.2 format in [0, 1], and "extra_logs" with both
        parts; float32 [n] each.
    """
    from r1v3.rewards import score

    completions = [q.removeprefix(p) for q, p in zip(queries, prompts, strict=True)]
    graded = score(completions, list(labels))
    total = torch.tensor([each.total for each in graded])
    parts = {
        "accuracy": torch.tensor([each.accuracy for each in graded]),
        "format": torch.tensor([each.format for each in graded]),
    }
    return {"rewards": total, "scores": total, "extra_logs": parts}
