"""The scoreboard of rewards: test inputs as other projects have them in their files."""

from pathlib import Path

import pytest

from benchmarks.reward_cases import Case, cases
from benchmarks.rewards import score, why

PARAMETRIZED = """
@pytest.mark.parametrize("gold,pred,language,expected", [
    ("1", "one is $1$", Language.FRENCH, 1),
    (r"\\frac12", "2", Language.CHINESE, False),
    (some_name, "3", Language.CHINESE, True),
])
def test(gold, pred, language, expected): ...
"""
ASSERTED = """
def test_accuracy():
    completions = [[{"content": "a"}], [{"content": "b"}]]
    solutions = ["a", "c"]
    rewards = accuracy_reward(completions, solutions)
    assert rewards[0] == 1.0
    assert rewards[1] == 0.0

def test_unparsable():
    completion, solution = 1, 2
    rewards = accuracy_reward(completion, solution)
    assert rewards[0] is None
"""
UNITTEST = """
class T:
    def test_accuracy(self):
        completion = [[{"content": "x"}]]
        solution = ["y"]
        rewards = accuracy_reward(completion, solution)
        self.assertEqual(rewards[0], 0.0)
"""
ZIPPED = """
answers = ["p", "q"]
gts = ["g", "h"]
def test_math():
    for completion, ground_truth in zip(answers, gts, strict=True):
        assert float(compute(completion, ground_truth)) == 1.0
"""
DICTIONARIES = """
@pytest.mark.parametrize("test_case", [{"completion": "m", "answer": "n"}], ids=str)
async def test_valid(test_case):
    assert state["metrics"] == 1.0

@pytest.mark.parametrize("test_case", [{"completion": "m", "answer": "k"}], ids=str)
async def test_invalid(test_case):
    assert state["metrics"] == 0.0
"""
JUDGED = r"""
PROMPT = '''
[Question]: q
[Standard Answer]: $\\sqrt{{3}}$
[Model_answer] : Extracted Answer: 1.73
Judgement: 1
'''
EXAMPLES = [{"query": "<question> w <groundtruth answer> 10% <answer> 7</s>", "answer": "False"}]
"""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (PARAMETRIZED, [("1", "one is $1$", True), ("\\frac12", "2", False)]),
        (ASSERTED, [("a", "a", True), ("c", "b", False)]),
        (UNITTEST, [("y", "x", False)]),
        (ZIPPED, [("g", "p", True), ("h", "q", True)]),
        (DICTIONARIES, [("n", "m", True), ("k", "m", False)]),
    ],
)
def test_inputs_are_read_out_of_test_files(
    tmp_path: Path, source: str, found: list[tuple[str, str, bool]]
) -> None:
    """Fails if an input of a public grader is left out or read with the wrong expectation."""
    path = tmp_path / "grader/tests/unit/test_some.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    origin = "grader/tests/unit/test_some.py"
    assert cases(tmp_path) == [Case(origin, *triple) for triple in found]


def test_worked_examples_of_judges_are_inputs(tmp_path: Path) -> None:
    """Fails if the examples in prompts of VLMEvalKit are not read, or keep a template's braces."""
    path = tmp_path / "VLMEvalKit/vlmeval/dataset/utils/some.py"
    path.parent.mkdir(parents=True)
    path.write_text(JUDGED)
    triples = {(case.gold, case.prediction, case.expected) for case in cases(tmp_path)}
    assert triples == {("$\\sqrt{3}$", "1.73", True), ("10%", "7", False)}


def test_an_input_is_counted_once(tmp_path: Path) -> None:
    """Fails if a row that one project took from another weighs twice."""
    for name in ("first", "second"):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "tests/test_a.py").write_text(ZIPPED)
    assert {case.project for case in cases(tmp_path)} == {"first"}


def test_a_graders_own_inputs_are_counted_apart() -> None:
    """Fails if agreeing with its own tests makes a grader better than it is on those of others."""
    given = [Case("Math-Verify/a", "1", "1", True), Case("verl/b", "1", "2", False)]
    result, _ = score("math-verify", lambda case: True, given, [False, True])
    assert (result.own_inputs, result.own_false) == (1, (0, 0))
    assert (result.others_false, result.r1v3_there) == ((1, 0), (1, 0))
    result, _ = score("r1v3", lambda case: False, given, [])
    assert (result.own_inputs, result.others_false) == (0, (0, 1))


@pytest.mark.parametrize(
    ("gold", "prediction", "refused", "kind"),
    [
        ("7", "so there are 7 of them", True, "running text"),
        ("7", "所以一共有7颗糖果", True, "running text"),
        ("x=7", "$x=3+3=7$", True, "equation chain"), ("7", "$7\\approx8$", True, "equation chain"),
        ("7", "$6,7$", False, "part of a list"), ("7", "$\\{7$", True, "not LaTeX"),
        ("f(x)", "$f(y)$", False, "our own"), ("7", "$x=7$", False, "our own"),
        ("(1,3)", "$[1,3]$", False, "our own"), ("20", "$20\\%$", False, "our own"),
    ],
)  # fmt: skip
def test_disagreements_have_a_kind(gold: str, prediction: str, refused: bool, kind: str) -> None:
    """Fails if a disagreement is put down to the input where the rule could be at fault."""
    assert why(Case("a/b", gold, prediction, True), refused) == kind
