"""NoWait and a thinking budget as logits processors of vLLM, by class path.

    VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL \\
        --logits-processors r1v3.integrations.vllm:NoWait r1v3.integrations.vllm:ThoughtBudget

A request asks for them with `SamplingParams(extra_args={"nowait": True, "thought_budget": 512})`,
over HTTP with `"vllm_xargs": {"nowait": 1, "thought_budget": 512}`. "nowait" may also be a list of
words. They are classes for vLLM's V1 model runner, made when vLLM asks for them. Its V2 runner
refuses them at load, and is what vLLM 0.32 takes where Triton runs, unless the variable says no.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from r1v3.data.thoughts import THINK_CLOSE, BudgetedThought
from r1v3.integrations.transformers import REFLECTION_WORDS, banned_ids, token_texts
from r1v3.kernels import ban_tokens_

State = TypeVar("State")
NOWAIT, THOUGHT_BUDGET = "nowait", "thought_budget"


def asked(params: Any, name: str) -> Any:
    """Return a request's extra argument, or None."""
    return (getattr(params, "extra_args", None) or {}).get(name)


def nowait_words(value: Any) -> tuple[str, ...]:
    """Return the words that a request's "nowait" asks to ban; none for None, False or 0.

    Raises:
        ValueError: it is neither a switch nor a list of words.
    """
    if value is None or value is False or value == 0:
        return ()
    if value is True or value == 1:
        return REFLECTION_WORDS
    if isinstance(value, list | tuple) and value and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise ValueError(f"{NOWAIT} must be true, 1, or a list of words, got {value!r}")


def thought_budget(value: Any) -> int | None:
    """Return the tokens that a request gives a thought, or None for no limit.

    Raises:
        ValueError: it is not an integer of at least 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{THOUGHT_BUDGET} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{THOUGHT_BUDGET} must be at least 0, got {value!r}")
    return int(value)


class Rows(Generic[State]):
    """The states of the requests in a batch, by their rows, which move as requests end.

    Args:
        new: makes a request's state from its parameters and the list of its output token ids,
            which vLLM extends in place; None for a request that asks for nothing.
    """

    def __init__(self, new: Callable[[Any, list[int]], State | None]) -> None:
        self._new = new
        self.states: dict[int, State] = {}

    def update(self, batch_update: Any) -> None:
        """Follow vLLM's `BatchUpdate`: requests removed, added, then moved or swapped."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.states.pop(row, None)
        for row, params, _, output in batch_update.added:
            self._put(row, self._new(params, output))
        for source, target, how in batch_update.moved:
            first, second = self.states.pop(source, None), self.states.pop(target, None)
            self._put(target, first)
            if how.name == "SWAP":
                self._put(source, second)

    def _put(self, row: int, state: State | None) -> None:
        self.states.pop(row, None)
        if state is not None:
            self.states[row] = state


def _tokenizer(vllm_config: Any) -> Any:
    from transformers import AutoTokenizer

    model = vllm_config.model_config
    return AutoTokenizer.from_pretrained(
        model.tokenizer, trust_remote_code=getattr(model, "trust_remote_code", False)
    )


def _nowait(base: type) -> type:
    """The class for requests with "nowait"."""

    class NoWait(base):  # type: ignore[misc, valid-type]
        """Never sample a reflection word, in any form that the vocabulary has as one token."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Raise ValueError for a "nowait" that cannot be understood."""
            nowait_words(asked(sampling_params, NOWAIT))

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self._tokenizer, self._device = _tokenizer(vllm_config), device
            self._ids: dict[tuple[str, ...], Tensor] = {}
            self._rows: Rows[tuple[str, ...]] = Rows(self._begin)

        def _begin(self, params: Any, output: list[int]) -> tuple[str, ...] | None:
            words = nowait_words(asked(params, NOWAIT))
            if words and words not in self._ids:
                ids = banned_ids(self._tokenizer, words)
                self._ids[words] = torch.tensor(ids, device=self._device)
            return words or None

        def is_argmax_invariant(self) -> bool:
            """Return that greedy decoding is changed too."""
            return False

        def update_state(self, batch_update: Any) -> None:
            """Follow the requests through the batch."""
            self._rows.update(batch_update)

        def apply(self, logits: Tensor) -> Tensor:
            """Ban the words in logits [rows, V], in place."""
            for words in set(self._rows.states.values()):
                rows = [row for row, own in self._rows.states.items() if own == words]
                enabled = torch.zeros(len(logits), dtype=torch.bool)
                enabled[rows] = True
                ban_tokens_(logits, self._ids[words], enabled=enabled.to(logits.device))
            return logits

    return NoWait


def _thought_budget(base: type) -> type:
    """The class for requests with "thought_budget"."""

    class ThoughtBudget(base):  # type: ignore[misc, valid-type]
        """Close a thought that is open after its budget, by forcing the tag's tokens."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Raise ValueError for a budget that is no number of tokens."""
            thought_budget(asked(sampling_params, THOUGHT_BUDGET))

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            tokenizer = _tokenizer(vllm_config)
            self._texts = token_texts(tokenizer)
            self._forced = tokenizer.encode(f"\n{THINK_CLOSE}\n\n", add_special_tokens=False)
            self._rows: Rows[_Request] = Rows(self._begin)

        def _begin(self, params: Any, output: list[int]) -> "_Request | None":
            budget = thought_budget(asked(params, THOUGHT_BUDGET))
            if budget is None:
                return None
            longest = getattr(params, "max_tokens", None)
            return _Request(BudgetedThought(budget, self._forced, longest), output)

        def is_argmax_invariant(self) -> bool:
            """Return that greedy decoding is changed too."""
            return False

        def update_state(self, batch_update: Any) -> None:
            """Follow the requests through the batch."""
            self._rows.update(batch_update)

        def apply(self, logits: Tensor) -> Tensor:
            """Force the tag's next token in logits [rows, V], in place, where one is due."""
            for row, request in self._rows.states.items():
                token = request.forced_token(self._texts)
                if token is not None:
                    logits[row] = -torch.inf
                    logits[row, token] = 0.0
            return logits

    return ThoughtBudget


class _Request:
    """A thought and how much of the request's output it has read."""

    def __init__(self, thought: BudgetedThought, output: list[int]) -> None:
        self._thought, self._output, self._read = thought, output, 0

    def forced_token(self, texts: Any) -> int | None:
        """Read what vLLM has added to the output; return the token that must follow, or None."""
        for token in self._output[self._read :]:
            self._thought.read(texts[token] if token < len(texts) else "")
        self._read = len(self._output)
        return self._thought.forced_token()


def __getattr__(name: str) -> type:
    """Make vLLM's class of this name, when vLLM or a user asks for it."""
    makers = {"NoWait": _nowait, "ThoughtBudget": _thought_budget}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.sample.logits_processor import LogitsProcessor

    globals()[name] = makers[name](LogitsProcessor)
    made: type = globals()[name]
    return made
