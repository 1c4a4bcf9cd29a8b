r"""Finding the final answer in a completion.

A completion is text from a model and is not trusted: every function here runs in time linear in
its length, on anything, and never raises.
"""

from __future__ import annotations

import re

from r1v3.rewards.notation import is_blank

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
MAX_ANSWER_CHARS = 1000

# "\\" before "boxed" is kept out of the escapes so that a doubled backslash still opens a box.
_BRACE_TOKEN = re.compile(r"\\boxed\s{0,8}\{|\\\\(?!boxed)|\\[{}]|[{}]")
_LETTER = r"[(\[（]?[A-Z][)\]）]?"
_LETTERS = (
    rf"{_LETTER}(?:(?:[ \t]{{0,4}}(?:[,、，&]|\band\b|和)[ \t]{{0,4}}|[ \t]{{0,8}}){_LETTER}"
    r"(?![A-Za-z])){0,8}"
)
_STATED = re.compile(
    # "Answer: ...", "the answer is ...": whatever follows, up to the end of the line
    r"(?P<answer>(?:\banswer\**[ \t]{0,4}(?:is\b|[:=：])|(?:答案|选项)(?:是|为|选|[:：]))"
    r"[ \t*:：]{0,8})"
    # "the correct option is (B)", "I choose B", "故选B": letters only
    r"|(?:\b(?:option|choice)\**[ \t]{0,4}(?:is\b|would be\b|should be\b|[:：])"
    r"|\b(?:I|we)(?:'d|'ll|[ \t]would|[ \t]will)?[ \t](?:choose|chose|pick|select|go[ \t]with)"
    r"(?:[ \t](?:the[ \t])?(?:option|choice|answer))?\b"
    r"|[故应]选|(?<!不)选择?(?:项|[:：])?)[ \t*:：]{0,8}"
    rf"(?P<chosen>{_LETTERS})(?![A-Za-z]|[ \t]{{0,4}}[?？])"
    # "Option B is correct"
    rf"|\b(?:option|choice|answer)[ \t](?P<correct>{_LETTERS})[ \t]is[ \t](?:the[ \t])?"
    r"(?:correct|right|best)\b"
    # "B is the correct answer"
    rf"|(?<![\w.])(?P<named>{_LETTERS})[ \t]is[ \t]the[ \t](?:correct|right|best)[ \t]"
    r"(?:answer|option|choice)\b"
    # "**B**", "**(B) 12**"
    r"|\*\*[ \t]{0,4}(?P<bold>[(（]?[A-Z](?:[)）][.:]?|[.:]|(?=[ \t]{0,4}\*\*))[^*\n]{0,200})"
    r"\*\*(?!\w)",
    re.IGNORECASE,
)
_ONLY_LETTERS = re.compile(
    rf"(?P<letters>{_LETTERS})(?![A-Za-z\d])[*]{{0,2}}[ \t]{{0,4}}"
    r"(?=[.。,，;；!]|\*|\Z|because\b|since\b|as\b|for\b|因为)"
)
_DOUBT = re.compile(r"\b(?:or|maybe|perhaps|possibly|either|could)\b|或|还是", re.IGNORECASE)
_DENIED = re.compile(
    r"[ \t]*[*_)\]]{0,4}[ \t]*(?:(?:is|was)(?: not\b|n't| wrong| incorrect| false| ruled)|[/|]"
    r"|(?:是|就|也)?(?:错|不对|不是|不正确)|吗|[?？])",
    re.IGNORECASE,
)
# Behind a statement: it is taken back ("Wait, ...", "Actually, ...", "that is wrong").
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|scratch that|on second thoughts?|correction|hold on)\b"
    r"|\b(?:that|this|it)(?: is|'s| was)(?: not|n't)?(?: wrong| incorrect| right| correct)",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(r"(?:that|this|it)(?: is|'s| was) (?:right|correct)\Z", re.IGNORECASE)
# In front of it, in the same sentence: it is only tried, or one of two.
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|unless|whether|were|n?either|n?or)"
    r"(?:[ \t]that)?(?:[ \t](?:the|your|my|our))?(?:[ \t](?:final|correct|right|best))?"
    r"[ \t*(]{1,4}\Z"
    r"|(?:如果|假设|若|假如|或)(?:正确)?的?\Z",
    re.IGNORECASE,
)
_BARE_ANSWER = re.compile(
    r"\(?[A-Z]\)?[.)]?|[-+]?\d{1,30}(?:\.\d{1,30})?\.?|\$[-+]?\d{1,30}(?:\.\d{1,30})?\$\.?"
    r"|(?:\([A-Z]\)|[A-Z][.)])[ \t][^\n]{1,200}"
)
_LAST_LETTER = re.compile(r"\(?[A-Z]\)?[.)]?")
_FILLER = r"(?:[\s$().]|\\[()\[\]]|\\q?quad|\\text\s?\{|\}){0,12}"
_BETWEEN_BOXES = re.compile(
    rf"{_FILLER}(?:[,;，；、]{_FILLER}(?:(?:and|or|和|或){_FILLER})?|(?P<word>and|or|和|或){_FILLER})"
)
_HOPE = re.compile(r"[.。]?\s*I hope it is correct.*", re.IGNORECASE)
_FORMULA_SENTENCE = re.compile(r"\s*(\$[^$]{1,400}\$)\s*[.。](?=\s|\Z)")
_CLOSING_MARKS = frozenset(" \t\n\r.。!*$)]}\\")


def find_boxed(text: str) -> list[str]:
    r"""Contents of every balanced `\boxed{...}`, in the order in which the boxes close.

    Escaped braces (`\{`, `\}`) do not count. A box that is never closed is left out. Of nested
    boxes both are returned, the inner one first.
    """
    return [content for content, _ in _boxes(text)]


def _boxes(text: str) -> list[tuple[str, int]]:
    """Contents of the boxes and where each one ends."""
    found: list[tuple[str, int]] = []
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
                found.append((text[start : token.start()], token.end()))
    return found


def final_text(completion: str) -> str:
    """The text after the last `</think>`; the whole completion if there is none.

    Nothing if a thought is opened after that and never closed: what stands in it is a draft.
    """
    text = completion.rpartition(THINK_CLOSE)[2]
    return "" if THINK_OPEN in text else text


def unwrap_boxed(answer: str) -> str:
    r"""`\boxed{\boxed{3}}` and `\boxed{3}` are both 3; other text is returned stripped."""
    answer = answer.strip()
    while answer.startswith("\\boxed"):
        inner = find_boxed(answer)
        if not inner or not answer.endswith(inner[-1] + "}"):
            break
        answer = inner[-1].strip()
    return answer


def _joined(text: str, boxes: list[tuple[str, int]]) -> str:
    r"""The last box, with those that only `,`, "and" or "or" part from it: `\boxed{1}, \boxed{2}`.

    Whoever boxes one answer after another gives them all, and hedges if that is "or".
    """
    last, end = boxes[-1]
    parts = [unwrap_boxed(last)]
    start = text.rindex("\\boxed", 0, end - len(last))
    for boxed, close in reversed(boxes[:-1]):
        between = _BETWEEN_BOXES.fullmatch(text, close, max(close, start))
        if between is None or close > start or len(parts) > 24:
            break
        parts.insert(0, between["word"] or ",")
        parts.insert(0, unwrap_boxed(boxed))
        start = text.rindex("\\boxed", 0, close - len(boxed))
    return parts[0] if len(set(parts[::2])) == 1 else " ".join(parts)


def _clean(answer: str) -> str | None:
    answer = answer.removeprefix("**").removesuffix("**").strip().rstrip(".。").strip()
    answer = answer.removesuffix("**").strip()
    return None if is_blank(answer) or len(answer) > MAX_ANSWER_CHARS else answer


def _stated(text: str) -> str | None:
    """The last answer that a sentence states, or None."""
    last = None
    for statement in _STATED.finditer(text):
        last = statement
    if last is None:
        return None
    behind = text[last.end() :]
    if _SUPPOSED.search(text[max(0, last.start() - 80) : last.start()]):
        return None
    if any(not _CONFIRMED.match(back[0]) for back in _TAKEN_BACK.finditer(behind)):
        return None
    rest = behind.partition("\n")[0]
    if last["answer"] is not None:
        letters = _ONLY_LETTERS.match(rest)
        if letters is not None and letters["letters"].strip("()[]（） ,").isupper():
            after = rest[letters.end() :]
            if _DENIED.match(after):
                return None
            if not _DOUBT.search(re.split(r"[.。](?:\s|\Z)", after, maxsplit=1)[0]):
                return letters["letters"].strip()
        formula = _FORMULA_SENTENCE.match(rest)
        return _clean(formula[1] if formula else _HOPE.sub("", rest))
    chosen = last["chosen"] or last["correct"] or last["named"] or last["bold"]
    if not chosen.lstrip("([（")[:1].isupper() or _DOUBT.match(rest.lstrip(" \t,，*")):
        return None
    if _DENIED.match(rest):
        return None
    return _clean(chosen)


def extract_answer(completion: str, *, thinking: bool = False) -> str | None:
    r"""The final answer of a completion, or None if it holds none.

    Looked for in the text after the last `</think>` (the whole text if that tag is missing), in
    this order: the last balanced `\boxed{...}` with something to see in it; the last
    `<answer>...</answer>`; the last sentence that states an answer ("answer: ..." or "the answer is
    ..." up to the end of its line, "the correct option is (B)", "I choose B", "**B**"); the last
    line if it is a letter; the whole text if it is nothing but a letter, a letter with its text, or
    a number. NUL bytes are dropped. An answer longer than 1,000 characters counts as none.

    A thought that is opened in the completion and never closed holds no answer.

    Args:
        thinking: the prompt has opened a thought. A completion that never closes it is all thought,
            and holds an answer only if it ends in one; a draft inside it does not count.
    """
    text = final_text(completion).replace("\x00", "")
    unclosed = thinking and THINK_CLOSE not in completion
    boxes = [box for box in _boxes(text) if not is_blank(unwrap_boxed(box[0]))]
    if boxes:
        if unclosed and not _CLOSING_MARKS.issuperset(text[boxes[-1][1] :]):
            return None
        answer = _joined(text, boxes)
        return answer if len(answer) <= MAX_ANSWER_CHARS else None
    if unclosed:
        text = text.strip().rpartition("\n")[2]
    tagged, _, _ = text.rpartition("</answer>")
    if "<answer>" in tagged:
        return _clean(tagged.rpartition("<answer>")[2])
    bare = text.strip()
    last_line = bare.rpartition("\n")[2].strip()
    if _LAST_LETTER.fullmatch(last_line):
        return last_line
    stated = _stated(text)
    if stated is not None:
        return stated
    if _BARE_ANSWER.fullmatch(bare):
        return bare.removeprefix("$").removesuffix(".").removesuffix("$")
    return None
