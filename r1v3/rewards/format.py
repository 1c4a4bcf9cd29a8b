r"""Format reward: eq. 1 of the Skywork-R1V3 report.

    R_format = 1 if the completion adheres to the template, else 0

Slow-thinking template (`thinking=True`). The prompt already ends in `<think>`, so the completion
usually starts inside the thought; a completion that repeats the opening tag is accepted as well.

    [whitespace <think>] thought </think> answer

- exactly one `</think>`; at most one `<think>`, with only whitespace before it;
- the thought holds something to see (boxes inside it are allowed and ignored);
- the answer holds `\boxed` exactly once, with balanced braces and something to see inside:
  spaces, zero-width characters, `\,` and `\text{}` are not an answer.
  Other text may stand before and after the box.

NoThink template (`thinking=False`): neither tag anywhere, and the same rule for the answer.
"""

from __future__ import annotations

from r1v3.rewards.extract import THINK_CLOSE, THINK_OPEN, find_boxed
from r1v3.rewards.notation import is_blank, visible


def _has_one_box(answer: str) -> bool:
    boxes = find_boxed(answer)
    return answer.count("\\boxed") == 1 and len(boxes) == 1 and not is_blank(boxes[0])


def format_reward(completion: str, *, thinking: bool = True) -> float:
    """1.0 if the completion has the template's form (module docstring), else 0.0 (eq. 1).

    Args:
        completion: the generated text, without the prompt.
        thinking: slow-thinking template, or the NoThink template if False.
    """
    if not thinking:
        tags = THINK_OPEN in completion or THINK_CLOSE in completion
        return float(not tags and _has_one_box(completion))
    if completion.count(THINK_CLOSE) != 1 or completion.count(THINK_OPEN) > 1:
        return 0.0
    thought, _, answer = completion.partition(THINK_CLOSE)
    thought = thought.strip()
    if THINK_OPEN in completion:
        if not thought.startswith(THINK_OPEN):
            return 0.0
        thought = thought.removeprefix(THINK_OPEN).strip()
    return float(bool(visible(thought).strip()) and _has_one_box(answer))
