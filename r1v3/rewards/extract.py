r"""Finding the final answer in a completion.

A completion is text from a model and is not trusted: every function here runs in time linear in
its length, on anything, and never raises.
"""

from __future__ import annotations

import re

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
MAX_ANSWER_CHARS = 1000

# "\\" before "boxed" is kept out of the escapes so that a doubled backslash still opens a box.
_BRACE_TOKEN = re.compile(r"\\boxed\s{0,8}\{|\\\\(?!boxed)|\\[{}]|[{}]")
_ANSWER_PHRASE = re.compile(
    r"(?:\banswer\**[ \t]{0,4}(?:is\b|[:=：])|答案(?:是|为|[:：]))[ \t*:：]{0,8}", re.IGNORECASE
)
_BARE_ANSWER = re.compile(r"\(?[A-Z]\)?[.)]?|[-+]?\d{1,30}(?:\.\d{1,30})?")


def find_boxed(text: str) -> list[str]:
    r"""Contents of every balanced `\boxed{...}`, in the order in which the boxes close.

    Escaped braces (`\{`, `\}`) do not count. A box that is never closed is left out. Of nested
    boxes both are returned, the inner one first.
    """
    found: list[str] = []
    open_braces: list[int | None] = []
    for token in _BRACE_TOKEN.finditer(text):
        kind = token.group()
        if kind == "{":
            open_braces.append(None)
        elif kind.startswith("\\boxed"):
            open_braces.append(token.end())
        elif kind == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                found.append(text[start : token.start()])
    return found


def final_text(completion: str) -> str:
    """The text after the last `</think>`; the whole completion if there is none."""
    return completion.rpartition(THINK_CLOSE)[2]


def unwrap_boxed(answer: str) -> str:
    r"""`\boxed{\boxed{3}}` and `\boxed{3}` are both 3; other text is returned stripped."""
    answer = answer.strip()
    while answer.startswith("\\boxed"):
        inner = find_boxed(answer)
        if not inner or not answer.endswith(inner[-1] + "}"):
            break
        answer = inner[-1].strip()
    return answer


def _clean(answer: str) -> str | None:
    answer = answer.replace("**", "").strip().rstrip(".。").strip()
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def extract_answer(completion: str) -> str | None:
    r"""The final answer of a completion, or None if it holds none.

    Looked for in the text after the last `</think>` (the whole text if that tag is missing), in
    this order: the last balanced, non-empty `\boxed{...}`; the last `<answer>...</answer>`; the
    last "answer: ..." or "the answer is ..." up to the end of its line; the whole text if it is
    nothing but one capital letter or one number. NUL bytes are dropped. An answer longer than
    1,000 characters counts as none.
    """
    text = final_text(completion).replace("\x00", "")
    for boxed in reversed(find_boxed(text)):
        answer = unwrap_boxed(boxed)
        if answer:
            return answer if len(answer) <= MAX_ANSWER_CHARS else None
    tagged, _, _ = text.rpartition("</answer>")
    if "<answer>" in tagged:
        return _clean(tagged.rpartition("<answer>")[2])
    phrase_end = None
    for phrase in _ANSWER_PHRASE.finditer(text):
        phrase_end = phrase.end()
    if phrase_end is not None:
        return _clean(text[phrase_end:].partition("\n")[0])
    bare = text.strip()
    return bare if _BARE_ANSWER.fullmatch(bare) else None
