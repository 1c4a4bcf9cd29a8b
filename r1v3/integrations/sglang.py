"""NoWait as a custom logit processor of SGLang.

The server is started with `--enable-custom-logit-processor`, and r1v3 must be installed there: what
a request carries is a reference to the class. Such a request has

    "custom_logit_processor": r1v3.integrations.sglang.NoWait.to_str(),
    "sampling_params": {"custom_params": {"banned_ids": banned_ids(tokenizer, words)}}

with `banned_ids` and `REFLECTION_WORDS` of `r1v3.integrations.transformers`.
"""

from typing import Any

import torch
from torch import Tensor


def _nowait(base: type) -> type:
    """The class of that base."""

    class NoWait(base):  # type: ignore[misc, valid-type]
        """Never sample a row's "banned_ids"; rows without them are left alone."""

        def __call__(
            self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None
        ) -> Tensor:
            """Ban in logits [rows, V], in place."""
            for row, params in enumerate(custom_param_list or []):
                if params and params.get("banned_ids"):
                    logits[row, params["banned_ids"]] = -torch.inf
            return logits

    NoWait.__qualname__ = "NoWait"  # pickled by name
    return NoWait


def __getattr__(name: str) -> type:
    """Make SGLang's class, when SGLang or a user asks for it."""
    if name != "NoWait":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    made = globals()["NoWait"] = _nowait(CustomLogitProcessor)
    return made
