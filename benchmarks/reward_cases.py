"""Test inputs of public graders, read from checkouts as syntax and never run."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Triple = tuple[str, str, bool]

_JUDGED = re.compile(
    r"\[Standard [Aa]nswer\]\s*:(?P<gold>[^\n]*)\n\s*\[Model[ _][Aa]nswer\]\s*:(?P<given>[^\n]*)\n"
    r"\s*\[?Judgement\]?\s*:\s*(?P<verdict>[01])\b"
)
_QUERY = re.compile(r"<groundtruth answer>(?P<gold>.*?)<answer>(?P<given>.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One test input of a grader; `origin` is its file, below the name of the checkout."""

    origin: str
    gold: str
    prediction: str
    expected: bool

    @property
    def project(self) -> str:
        """The project that wrote it."""
        return self.origin.split("/")[0]


def _literal(node: ast.AST) -> Any:
    """The value of an expression of constants, else None."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _parametrized(tree: ast.Module) -> Iterator[Triple]:
    """Rows of `@pytest.mark.parametrize("gold,pred,...,expected", [...])`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize")):
            continue
        if len(node.args) < 2 or not isinstance(node.args[1], ast.List):
            continue
        names = ast.unparse(node.args[0]).strip("'\"").replace(" ", "").split(",")
        if names[:2] != ["gold", "pred"] or names[-1] != "expected":
            continue
        for row in node.args[1].elts:
            if isinstance(row, ast.Tuple) and len(row.elts) == len(names):
                gold, prediction, *_, expected = (_literal(part) for part in row.elts)
                if isinstance(gold, str) and isinstance(prediction, str) and expected is not None:
                    yield gold, prediction, bool(expected)


def _asserted(tree: ast.Module) -> Iterator[Triple]:
    """`completion = ...; solution = ...` and what is asserted of `accuracy_reward`'s items."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        if "accuracy_reward(" not in ast.unparse(function):
            continue
        given: dict[str, Any] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                given[ast.unparse(node.targets[0])] = _literal(node.value)
        completions = given.get("completion") or given.get("completions")
        solutions = given.get("solution") or given.get("solutions")
        if not completions or not solutions:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and "assertEqual" in ast.unparse(node.func):
                left, right = node.args[:2]
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
                left, right = node.left, node.comparators[0]
            else:
                continue
            if isinstance(left, ast.Subscript) and isinstance(_literal(right), float):
                i = _literal(left.slice)
                if isinstance(i, int) and i < min(len(completions), len(solutions)):
                    yield solutions[i], completions[i][0]["content"], _literal(right) == 1.0


def _asserted_score(function: ast.AST) -> float | None:
    """The number that a test asserts a score to be, as `... == 1.0`, if it is one number."""
    found = [
        _literal(node.comparators[0])
        for node in ast.walk(function)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)
    ]
    numbers = {value for value in found if isinstance(value, float)}
    return numbers.pop() if len(numbers) == 1 else None


def _zipped(tree: ast.Module) -> Iterator[Triple]:
    """`for completion, ground_truth in zip(answers, gts)` over lists of the module."""
    lists = {
        ast.unparse(node.targets[0]): _literal(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for loop in ast.walk(function):
            if not (isinstance(loop, ast.For) and isinstance(loop.iter, ast.Call)):
                continue
            sources = [lists.get(ast.unparse(part)) for part in loop.iter.args]
            score = _asserted_score(function)
            if ast.unparse(loop.target) != "(completion, ground_truth)" or score is None:
                continue
            if len(sources) == 2 and sources[0] and sources[1]:
                for prediction, gold in zip(*sources, strict=True):
                    yield gold, prediction, score == 1.0


def _dictionaries(tree: ast.Module) -> Iterator[Triple]:
    """`parametrize("test_case", [{"completion": ..., "answer": ...}])` and the asserted score."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.AsyncFunctionDef | ast.FunctionDef):
            continue
        score = _asserted_score(function)
        for decorator in function.decorator_list:
            if not isinstance(decorator, ast.Call) or len(decorator.args) != 2:
                continue
            rows = _literal(decorator.args[1])
            for row in rows if isinstance(rows, list) and score is not None else []:
                if isinstance(row, dict) and {"completion", "answer"} <= row.keys():
                    yield row["answer"], row["completion"], score == 1.0


def _filled(text: str) -> str:
    """Text of a template as it is shown, with single braces."""
    return text.replace("{{", "{").replace("}}", "}") if "{{" in text else text


def _judged(tree: ast.Module) -> Iterator[Triple]:
    """Worked examples of judgements in the prompts of a judge."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for match in _JUDGED.finditer(node.value):
                given = match["given"].strip().removeprefix("Extracted Answer:").strip()
                yield _filled(match["gold"].strip()), _filled(given), match["verdict"] == "1"
        elif isinstance(node, ast.Dict):
            row = _literal(node)
            if isinstance(row, dict) and set(row) == {"query", "answer"}:
                query = _QUERY.search(row["query"])
                if query is not None:
                    given = query["given"].replace("</s>", "").strip()
                    yield query["gold"].strip(), given, row["answer"].endswith("True")


def cases(folder: Path) -> list[Case]:
    """Every test input under the checkouts in `folder`, each once."""
    found: dict[Case, None] = {}
    readers = {
        "*/tests/**/*.py": (_parametrized, _asserted, _zipped, _dictionaries),
        "VLMEvalKit/vlmeval/dataset/utils/*.py": (_judged,),
    }
    for pattern, kinds in readers.items():
        for path in sorted(folder.glob(pattern)):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            origin = str(path.relative_to(folder))
            for read in kinds:
                for gold, prediction, expected in read(tree):
                    found[Case(origin, gold, prediction, expected)] = None
    return list(_once(list(found)))


def _once(given: list[Case]) -> Iterator[Case]:
    """Cases without those that another file has too."""
    seen = set()
    for case in given:
        key = (case.gold, case.prediction, case.expected)
        if key not in seen:
            seen.add(key)
            yield case
