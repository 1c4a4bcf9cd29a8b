"""NoWait and the thinking budget inside `generate` of transformers, on the demo's InternVL."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from r1v3.integrations.transformers import NoWait, ThoughtBudget, token_texts  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny-internvl"
ROWS = 16
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{}<|im_end|>\n<|im_start|>assistant\n<think>\n"
)
QUESTIONS = [
    "What is three plus four?", "Compute the result.", "Which is larger?", "Add 12 and 5.",
    "What is 9-3?", "Which row is it?", "Count.", "Is 7 even?", "Sort 3, 1, 2.", "Name a color.",
]  # fmt: skip


@cache
def loaded() -> tuple[Any, Any]:
    """Tokenizer and model."""
    words = transformers.AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32
    )
    return words, model.eval()


def prompts(questions: list[str]) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths."""
    words, _ = loaded()
    texts = [PROMPT.format(question) for question in questions]
    return dict(words(texts, return_tensors="pt", padding=True, add_special_tokens=False))


def generate(inputs: dict[str, torch.Tensor], *processors: Any, **settings: Any) -> Any:
    """Sample with a fixed seed."""
    words, model = loaded()
    torch.manual_seed(0)
    defaults = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return model.generate(
        **inputs, max_new_tokens=40, pad_token_id=words.pad_token_id,
        eos_token_id=words.convert_tokens_to_ids("<|im_end|>"),
        logits_processor=transformers.LogitsProcessorList(processors), **{**defaults, **settings},
    )  # fmt: skip


# Words that this model often samples; the reflection words themselves are rare here.
COMMON = ["the", "is", "So", "see", "I", "are", "It", "larger", "sum", "result"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_nowait_is_suppress_tokens_of_all_surface_forms(question: str) -> None:
    """Fails if a form of a word is sampled, or another token's probability changes."""
    words, _ = loaded()
    inputs = prompts([question] * ROWS)
    length = inputs["input_ids"].shape[1]
    nowait = NoWait(words, COMMON)
    ids = nowait.token_ids
    suppress = transformers.SuppressTokensLogitsProcessor(ids.tolist())
    plain = generate(inputs)[:, length:]
    banned = generate(inputs, nowait)[:, length:]
    assert torch.isin(plain, ids).any()
    assert not torch.isin(banned, ids).any()
    assert torch.equal(banned, generate(inputs, suppress)[:, length:])


def test_nowait_of_some_rows_leaves_the_others_alone() -> None:
    """Fails if `enabled` reaches another row, or output_logits are overwritten."""
    words, _ = loaded()
    inputs = prompts([QUESTIONS[0]] * ROWS)
    length = inputs["input_ids"].shape[1]
    enabled = torch.arange(ROWS) % 2 == 0
    nowait = NoWait(words, COMMON, enabled=enabled)
    out = generate(inputs, nowait, output_logits=True, return_dict_in_generate=True)
    hits = torch.isin(out.sequences[:, length:], nowait.token_ids).any(1)
    assert not hits[enabled].any() and hits[~enabled].any()
    assert all(step.isfinite().all() for step in out.logits)


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 5, 8, 12, 15, 18, 22, 30])
def test_a_thought_is_closed_at_its_budget(budget: int) -> None:
    """Fails if a thought stays open beyond its budget, or is closed twice, for padded prompts."""
    words, _ = loaded()
    inputs = prompts(QUESTIONS)
    length = inputs["input_ids"].shape[1]
    out = generate(inputs, ThoughtBudget(words, budget, length))[:, length:]
    forced = words.encode("\n</think>\n\n", add_special_tokens=False)
    texts, ended = token_texts(words), words.convert_tokens_to_ids("<|im_end|>")
    stopped = 0
    for row in out.tolist():
        row = row[: row.index(ended)] if ended in row else row
        thought = "".join(texts[i] for i in row[:budget])
        if len(row) < budget or "</think>" in thought:
            continue
        whole = "".join(texts[i] for i in row)
        assert whole.count("</think>") == 1
        if row[budget : budget + len(forced)] == forced:
            stopped += 1
        else:  # the model was writing the tag itself when its budget ended
            assert any(thought.endswith("</think>"[:n]) for n in range(2, 8))
    assert stopped > 0 or budget > 15


def test_beams_keep_their_own_thoughts() -> None:
    """Fails if a beam that moves to another row takes that row's count of tokens with it."""
    words, _ = loaded()
    inputs = prompts(QUESTIONS[:3])
    length = inputs["input_ids"].shape[1]
    out = generate(
        inputs, ThoughtBudget(words, 6, length), do_sample=False, num_beams=4,
        num_return_sequences=4, temperature=None, top_p=None, top_k=None,
    )[:, length:]  # fmt: skip
    texts = token_texts(words)
    for row in out.tolist():
        whole = "".join(texts[i] for i in row)
        assert whole.count("</think>") == 1
        assert "</think>" in "".join(texts[i] for i in row[: 6 + 9])
