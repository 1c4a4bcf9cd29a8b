"""`python -m benchmarks.rewards FOLDER`: the rule reward on other graders' own test inputs.

FOLDER holds checkouts of public graders (`Math-Verify`, `lighteval`, `open-r1`, `trl`, `verifiers`,
`verl`, `VLMEvalKit`), fetched by whoever runs this; `reward_cases` takes (gold, prediction,
expected) from their tests and, of VLMEvalKit, from the worked examples of its judges. Each grader
decides all of them: r1v3's rule; math-verify, if installed, on the texts as its tests have them;
verl's `math_dapo` and `prime_math`, if the checkout has them and what they import is installed
(prime_math: pylatexenc and antlr4-python3-runtime 4.11), on the extracted answers.

An expectation is what the project that wrote the test expects, which is not always what is right,
and a grader that is developed on its own tests agrees with them: inputs of a grader's own project
are counted apart (`own`), and what compares graders is `others` beside r1v3 on the same inputs
(`r1v3 there`). r1v3 has no inputs here, but its rules were written with its disagreements in view.
These are listed, each with why it stands:

- running text: the answer is in a sentence without a box or an "answer is"; a policy that does not
  say which number is its answer is not paid for one of them;
- equation chain: an equation with several signs that does not hold, or holds nothing that is
  named;
- part of a list: the gold has more or fewer values than the answer, as 2 for `1,2`;
- not LaTeX: braces or brackets that do not match;
- our own: everything else, where another rule could be right.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from benchmarks import machine
from benchmarks.reward_cases import Case, cases
from r1v3 import files
from r1v3.rewards.extract import extract_answer
from r1v3.rewards.rules import Judgement, judge
from r1v3.rewards.symbolic import _pool

SCHEMA = 2
_FORMULA = re.compile(
    r"\$\$((?:.|\n)+?)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$|\\\[((?:.|\n)+?)\\\]|\\\((.+?)\\\)"
)


@dataclass
class Score:
    """Results of a grader; `microseconds` is CPU time per answer, false answers are (+, -).

    `r1v3_there`: r1v3's false answers on the same inputs of others.
    """

    grader: str
    agreement: float
    own_inputs: int
    own_false: tuple[int, int]
    others_agreement: float
    others_false: tuple[int, int]
    r1v3_there: tuple[int, int]
    microseconds: float


# lighteval holds the rules that math-verify was made of.
_OWN = {
    "math-verify": {"Math-Verify", "lighteval"},
    "verl math_dapo": {"verl"},
    "verl prime_math": {"verl"},
}


def _answer(text: str) -> str:
    """The graded part: the final answer of a text, else its last formula, else all of it.

    Only this benchmark takes a last formula for an answer: whole sentences of prose are inputs of
    other projects, and what is compared here is what they make of the formulas.
    """
    found = extract_answer(text)
    if found is not None:
        return found
    formulas = _FORMULA.findall(text)
    return next((part for part in formulas[-1] if part), text) if formulas else text


def ours(case: Case) -> Judgement:
    """r1v3's rule."""
    return judge(_answer(case.prediction), _answer(case.gold))


def math_verify() -> Callable[[Case], bool] | None:
    """math-verify alone with its defaults."""
    if importlib.util.find_spec("math_verify") is None:
        return None
    from math_verify import parse, verify

    return lambda case: bool(verify(parse(case.gold), parse(case.prediction)))


def _verl(folder: Path, name: str) -> ModuleType | None:
    """A grader of verl from a checkout, without the package around it, or None."""
    root = folder / "verl/verl"
    if not (root / "utils/reward_score").is_dir():
        return None
    for package in ("verl", "verl.utils", "verl.utils.reward_score"):
        module = ModuleType(package)
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules.setdefault(package, module)
    try:
        return importlib.import_module(f"verl.utils.reward_score.{name}")
    except ImportError:
        return None


def math_dapo(folder: Path) -> Callable[[Case], bool] | None:
    """verl's `math_dapo`."""
    module = _verl(folder, "math_dapo")
    if module is None:
        return None
    return lambda case: bool(
        module.compute_score(f"Answer: {_answer(case.prediction)}", _answer(case.gold))["acc"]
    )


def prime_math(folder: Path) -> Callable[[Case], bool] | None:
    """verl's `prime_math`."""
    module = _verl(folder, "prime_math")
    if module is None:
        return None

    def grade(case: Case) -> bool:
        with contextlib.redirect_stdout(io.StringIO()):
            text = f"\\boxed{{{_answer(case.prediction)}}}"
            return bool(module.compute_score(text, _answer(case.gold))[0])

    return grade


def _cpu_seconds() -> float:
    """CPU time of this process, of its ended children and of the one that proves equalities."""
    ended = os.times()
    seconds = time.process_time() + ended.children_user + ended.children_system
    for worker in _pool.workers:
        if worker.process is None:
            continue
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / 100
    return seconds


def _false(pairs: list[tuple[bool, bool]]) -> tuple[int, int]:
    """Numbers of false positives and of false negatives in (verdict, expected)."""
    positives = sum(verdict and not expected for verdict, expected in pairs)
    return positives, sum(expected and not verdict for verdict, expected in pairs)


def _agreement(pairs: list[tuple[bool, bool]]) -> float:
    return sum(verdict == expected for verdict, expected in pairs) / max(1, len(pairs))


def score(
    name: str, grader: Callable[[Case], bool], given: list[Case], reference: list[bool]
) -> tuple[Score, list[bool]]:
    """Grade all cases; an exception counts as a rejection. `reference`: r1v3's verdicts, if any."""
    verdicts = []
    begin = _cpu_seconds()
    for case in given:
        try:
            verdicts.append(grader(case))
        except Exception:
            verdicts.append(False)
    spent = _cpu_seconds() - begin
    pairs = list(zip(verdicts, [case.expected for case in given], strict=True))
    mine = [case.project in _OWN.get(name, ()) for case in given]
    own = [pair for pair, is_own in zip(pairs, mine, strict=True) if is_own]
    others = [pair for pair, is_own in zip(pairs, mine, strict=True) if not is_own]
    there = [
        (verdict, case.expected)
        for verdict, case, is_own in zip(reference or verdicts, given, mine, strict=True)
        if not is_own
    ]
    return (
        Score(
            name,
            _agreement(pairs),
            len(own),
            _false(own),
            _agreement(others),
            _false(others),
            _false(there),
            1e6 * spent / len(pairs),
        ),
        verdicts,
    )


def why(case: Case, refused: bool) -> str:
    """The reason for which a disagreement of r1v3 stands: a kind of the module docstring."""
    answer, gold = _answer(case.prediction), _answer(case.gold)
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[A-Za-z]+", " ", answer))
    if len(words) > 1 and any(word == word.lower() for word in words):
        return "running text"
    if any(
        text.count(pair[0]) != text.count(pair[1])
        for text in (answer, gold)
        for pair in ("{}", "()", "[]")
    ):
        return "not LaTeX"
    signs = [len(re.findall(r"=|\\approx|\\geq", text)) for text in (answer, gold)]
    if refused and (max(signs) > 1 or "\\approx" in answer):
        return "equation chain"
    lengths = [len(re.split("[,;]", text)) for text in (answer, gold)]
    if not refused and lengths[0] != lengths[1] and "\\in" not in answer:
        return "part of a list"
    return "our own"


def disagreements(given: list[Case], verdicts: list[bool]) -> Counter[str]:
    """Print every case that r1v3 decides otherwise than expected; return the kinds with counts."""
    wrong = []
    for case, verdict in zip(given, verdicts, strict=True):
        if verdict != case.expected:
            refused = ours(case).refused
            wrong.append({**asdict(case), "refused": refused, "why": why(case, refused)})
    reasons = Counter(entry["why"] for entry in wrong)
    print("r1v3 disagrees:", ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()))
    for entry in sorted(wrong, key=lambda entry: entry["why"]):
        kind = "false -" if entry["expected"] else "false +"
        state = "refused" if entry["refused"] else ""
        gold, answer = _answer(entry["gold"])[-60:], _answer(entry["prediction"])[-70:]
        print(f"{entry['why']:<15}{kind} {state:<8}{gold!r}  {answer!r}  {entry['origin']}")
    return reasons


def main(arguments: list[str] | None = None) -> int:
    """Print the scoreboard and the disagreements; write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewards", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of checkouts")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(arguments)
    given = cases(options.folder)
    if not given:
        print(f"{options.folder}: no checkout with test inputs", file=sys.stderr)
        return 1
    graders: dict[str, Callable[[Case], bool] | None] = {
        "r1v3": lambda case: ours(case).correct,
        "math-verify": math_verify(),
        "verl math_dapo": math_dapo(options.folder),
        "verl prime_math": prime_math(options.folder),
    }
    judge("x", "2x")  # starts the child, whose start is no part of an answer
    scores: list[Score] = []
    verdicts: dict[str, list[bool]] = {}
    projects = Counter(case.project for case in given)
    print(f"{len(given)} inputs:", ", ".join(f"{name} {n}" for name, n in projects.items()))
    head = ("grader", "agreement", "own +/-", "others", "others +/-", "r1v3 there", "CPU us")
    print("{:<16}{:>10}{:>9}{:>8}{:>12}{:>12}{:>8}".format(*head))
    for name, grader in graders.items():
        if grader is None:
            print(f"{name:<16} not installed")
            continue
        result, verdicts[name] = score(name, grader, given, verdicts.get("r1v3", []))
        scores.append(result)
        own = "/".join(map(str, result.own_false)) if result.own_inputs else "-"
        others, there = ("/".join(map(str, x)) for x in (result.others_false, result.r1v3_there))
        print(
            f"{name:<16}{result.agreement:>10.3f}{own:>9}{result.others_agreement:>8.3f}"
            f"{others:>12}{there:>12}{result.microseconds:>8.0f}"
        )
    reasons = disagreements(given, verdicts["r1v3"])
    if options.json is not None:
        document = {
            "schema": SCHEMA,
            "header": machine.header("cpu"),
            "inputs": dict(projects),
            "disagreements": dict(reasons),
            "scores": [asdict(result) for result in scores],
        }
        files.write_text(options.json, json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
