"""`python -m benchmarks.rewards FOLDER`: the rule reward on other graders' own test inputs.

FOLDER holds checkouts of public graders (`Math-Verify`, `open-r1`, `verl`), fetched by whoever runs
this. Their test files are read as syntax and never run; triples of (gold, prediction, expected) are
taken from them. Each grader decides all of them: r1v3's rule; math-verify, if installed, on the
texts as its tests have them; verl's `math_dapo`, if the checkout has it, on the extracted answers.
An expectation is what the project that wrote the test expects, which is not always what is right:
every disagreement of r1v3 is listed.
"""

import argparse
import ast
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from r1v3 import files
from r1v3.rewards.extract import extract_answer
from r1v3.rewards.rules import Judgement, judge
from r1v3.rewards.symbolic import _worker

SCHEMA = 1
_FORMULA = re.compile(
    r"\$\$((?:.|\n)+?)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$|\\\[((?:.|\n)+?)\\\]|\\\((.+?)\\\)"
)


@dataclass(frozen=True)
class Case:
    """One test input of a grader."""

    origin: str
    gold: str
    prediction: str
    expected: bool


@dataclass
class Score:
    """Results of a grader on the cases; `microseconds` is CPU time per answer."""

    grader: str
    agreement: float
    false_positives: int
    false_negatives: int
    microseconds: float


def _parametrized(tree: ast.Module) -> Iterator[tuple[str, str, bool]]:
    """Rows of `@pytest.mark.parametrize("gold,pred,expected", [...])`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize")):
            continue
        if len(node.args) < 2 or not isinstance(node.args[1], ast.List):
            continue
        names = ast.unparse(node.args[0]).strip("'\"").replace(" ", "").split(",")
        if names[:2] != ["gold", "pred"] or names[-1] != "expected" or len(names) != 3:
            continue
        for row in node.args[1].elts:
            try:
                gold, prediction, expected = ast.literal_eval(row)
            except ValueError:
                continue
            if isinstance(gold, str) and isinstance(prediction, str):
                yield gold, prediction, bool(expected)


def _asserted(tree: ast.Module) -> Iterator[tuple[str, str, bool]]:
    """`completion = ...; solution = ...; assertEqual(rewards[i], x)` around `accuracy_reward`."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or "accuracy_reward(" not in ast.unparse(
            function
        ):
            continue
        given: dict[str, Any] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                try:
                    given[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
                except ValueError:
                    continue
        completions = given.get("completion", given.get("completions"))
        solutions = given.get("solution", given.get("solutions"))
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and "assertEqual" in ast.unparse(node.func)):
                continue
            left, right = node.args[:2]
            if isinstance(left, ast.Subscript) and isinstance(right, ast.Constant):
                i = ast.literal_eval(left.slice)
                if completions and solutions and i < min(len(completions), len(solutions)):
                    yield solutions[i], completions[i][0]["content"], right.value == 1.0


def cases(folder: Path) -> list[Case]:
    """Every test input under the checkouts in `folder`, each once."""
    found: dict[Case, None] = {}
    for path in sorted(folder.glob("*/tests/**/*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        origin = str(path.relative_to(folder))
        for gold, prediction, expected in [*_parametrized(tree), *_asserted(tree)]:
            found[Case(origin, gold, prediction, expected)] = None
    return list(found)


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


def math_dapo(folder: Path) -> Callable[[Case], bool] | None:
    """verl's `math_dapo`, from a checkout."""
    path = folder / "verl/verl/utils/reward_score/math_dapo.py"
    spec = importlib.util.spec_from_file_location("math_dapo", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda case: bool(
        module.compute_score(f"Answer: {_answer(case.prediction)}", _answer(case.gold))["acc"]
    )


def _cpu_seconds() -> float:
    """CPU time of this process and of the child that proves equalities."""
    seconds = time.process_time()
    if _worker.process is not None:
        fields = Path(f"/proc/{_worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / 100
    return seconds


def score(name: str, grader: Callable[[Case], bool], given: list[Case]) -> tuple[Score, list[bool]]:
    """Grade all cases; an exception counts as a rejection."""
    verdicts = []
    begin = _cpu_seconds()
    for case in given:
        try:
            verdicts.append(grader(case))
        except Exception:
            verdicts.append(False)
    spent = _cpu_seconds() - begin
    pairs = list(zip(verdicts, [case.expected for case in given], strict=True))
    return (
        Score(
            name,
            sum(verdict == expected for verdict, expected in pairs) / len(pairs),
            sum(verdict and not expected for verdict, expected in pairs),
            sum(expected and not verdict for verdict, expected in pairs),
            1e6 * spent / len(pairs),
        ),
        verdicts,
    )


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
    }
    judge("x", "2x")  # starts the child, whose start is no part of an answer
    scores, verdicts = [], {}
    print(f"{len(given)} inputs of {len({case.origin for case in given})} files")
    print(f"{'grader':<16}{'agreement':>10}{'false +':>9}{'false -':>9}{'CPU us':>9}")
    for name, grader in graders.items():
        if grader is None:
            print(f"{name:<16} not installed")
            continue
        result, verdicts[name] = score(name, grader, given)
        scores.append(result)
        print(
            f"{name:<16}{result.agreement:>10.3f}{result.false_positives:>9}"
            f"{result.false_negatives:>9}{result.microseconds:>9.0f}"
        )
    wrong = [
        {**asdict(case), "refused": ours(case).refused}
        for case, verdict in zip(given, verdicts["r1v3"], strict=True)
        if verdict != case.expected
    ]
    for entry in wrong:
        kind = "false -" if entry["expected"] else "false +"
        refused = "refused" if entry["refused"] else ""
        answer = _answer(entry["prediction"])[-70:]
        print(f"{kind} {refused:<8}{_answer(entry['gold'])[-60:]!r}  {answer!r}  {entry['origin']}")
    if options.json is not None:
        document = {
            "schema": SCHEMA,
            "header": machine.header("cpu"),
            "inputs": len(given),
            "scores": [asdict(result) for result in scores],
        }
        files.write_text(options.json, json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
