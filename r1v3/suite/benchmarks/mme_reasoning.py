"""MME-Reasoning: 1,188 questions of logic; choices, open answers, and puzzles that are checked."""

from r1v3.rewards.extract import find_boxed
from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.puzzles import CHECKS
from r1v3.suite.question import Question, Response
from r1v3.suite.rules import answer_rule
from r1v3.suite.table import File, Row, read_list, read_value

_CAPABILITIES = (
    "planning and exploring",
    "calculation",
    "spatial-temporal",
    "casual chaining analysis",
    "pattern analysis",
)
_TYPES = ("inductive", "deductive", "abductive")
_NOT_PUZZLES = ("", "choice_function", "open_function")


def _question(row: Row, number: int) -> Question:
    function = row["function_id"]
    if function not in _NOT_PUZZLES and function not in CHECKS:
        raise ValueError(f"function_id {function!r} is unknown")
    gold = row["answer"]
    if function in _NOT_PUZZLES and row["question_type"].lower() == "choice":
        gold = ", ".join(read_list(gold))
    labels = {
        "capability": "|".join(name for name in _CAPABILITIES if name in row["capability"]),
        "reasoning": "|".join(name for name in _TYPES if name in row["reasoning_type"]),
    }
    return plain_question(row, gold=gold, labels=labels)


def rule(question: Question, response: Response) -> bool | None:
    """The puzzle's own check, else the answer."""
    check = CHECKS.get(question.cells.get("function_id", ""))
    if check is None:
        return answer_rule(question, response)
    if not response.final:
        return False
    gold = read_value(question.gold)
    info = read_value(question.cells.get("special_info", ""))
    boxes = find_boxed(response.final)
    for text in (*boxes[-1:], response.final):
        verdict = check(text, gold, info)
        if verdict is not None:
            return verdict
    return None


BENCHMARK = Benchmark(
    key="mme_reasoning",
    title="MME-Reasoning",
    files=(File("MME_Reasoning.tsv", "b243f44778782d3821523689f6b40a1e"),),
    report=42.8,
    columns=("index", "question", "answer", "question_type", "function_id"),
    question=_question,
    rule=rule,
    kit_rule=kit.judge_rule,
    kit_name="MME-Reasoning",
    differences=("puzzles are read by rules; the kit asks a judge to",),
)
