"""The reward of the Skywork-R1V3 report, eq. 1 to 3.

R_format = 1 if the completion adheres to the template, else 0              (eq. 1)
R_acc    = 1 if the rule or the verifier accepts the answer, else 0         (eq. 2)
R        = w R_acc + (1 - w) R_format,   w = 0.8                            (eq. 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from r1v3.cores import cores_of_rank
from r1v3.rewards.choices import option_texts
from r1v3.rewards.extract import extract_answer
from r1v3.rewards.format import format_reward
from r1v3.rewards.rules import Judgement, judge
from r1v3.rewards.verifier import LLMVerifier

# An extracted answer or None, the ground truth, and the options.
Case = tuple[str | None, str, tuple[str, ...] | None]


class Gradable(Protocol):
    """A sample that can be graded, such as `r1v3.data.sample.Sample`."""

    @property
    def question(self) -> str: ...
    @property
    def ground_truth(self) -> str: ...
    @property
    def options(self) -> Sequence[str] | None: ...


@dataclass(frozen=True)
class Reward:
    """Reward of one completion and its parts, all in [0, 1].

    Attributes:
        total: eq. 3.
        accuracy: eq. 2, the larger of `rule` and `verifier`.
        format: eq. 1.
        rule: 1.0 if the rule accepts.
        verifier: 1.0 or 0.0 as the judge said; None if it was not asked or gave no verdict.
        extracted: the final answer found in the completion, if any.
        refused: the rule could not decide (an answer or ground truth that it cannot read, numbers
            too large, no proof within its limits), so that it did not accept.
    """

    total: float
    accuracy: float
    format: float
    rule: float
    verifier: float | None
    extracted: str | None
    refused: bool = False


def total_reward(accuracy: float, format: float, weight: float = 0.8) -> float:
    """Eq. 3: `weight * accuracy + (1 - weight) * format`.

    Raises:
        ValueError: weight is not in [0, 1].
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight {weight!r} must be between 0 and 1")
    return weight * accuracy + (1.0 - weight) * format


def score(
    completions: Sequence[str],
    samples: Sequence[Gradable | str],
    *,
    weight: float = 0.8,
    verifier: LLMVerifier | None = None,
    thinking: bool = True,
) -> list[Reward]:
    """Rewards of completions, in order (eq. 1 to 3).

    Args:
        completions: generated texts, without their prompts.
        samples: for each completion, its sample, or just its ground truth as text (then there are
            no options, and a verifier sees no question).
        weight: w of eq. 3.
        verifier: asked only about answers that the rule rejects and that could be extracted.
        thinking: slow-thinking template; False for the NoThink template.

    Raises:
        ValueError: the two lists differ in length, or weight is not in [0, 1].
        RuntimeError: sympy cannot be run.
    """
    if len(completions) != len(samples):
        raise ValueError(
            f"completions has {len(completions)} entries and samples {len(samples)}; "
            "there must be one sample per completion"
        )
    total_reward(0.0, 0.0, weight)
    answers = [extract_answer(completion, thinking=thinking) for completion in completions]
    cases: list[Case] = []
    questions: list[tuple[str, str]] = []
    for answer, sample in zip(answers, samples, strict=True):
        if isinstance(sample, str):
            question, ground_truth, options = "", sample, None
        else:
            question, ground_truth, options = sample.question, sample.ground_truth, sample.options
        cases.append((answer, ground_truth, None if options is None else tuple(options)))
        questions.append((with_options(question, options), ground_truth))
    judgements = judge_all(cases)

    judged: dict[int, float | None] = {}
    if verifier is not None:
        open_rows = [i for i, answer in enumerate(answers) if answer and not judgements[i].correct]
        verdicts = verifier.verify_answers([(*questions[i], answers[i]) for i in open_rows])
        for i, verdict in zip(open_rows, verdicts, strict=True):
            judged[i] = None if verdict.correct is None else float(verdict.correct)

    rewards = []
    for i, completion in enumerate(completions):
        opinion, rule = judged.get(i), float(judgements[i].correct)
        accuracy = max(rule, opinion or 0.0)
        form = format_reward(completion, thinking=thinking)
        total = total_reward(accuracy, form, weight)
        refused = judgements[i].refused
        rewards.append(Reward(total, accuracy, form, rule, opinion, answers[i], refused))
    return rewards


def judge_all(cases: Sequence[Case]) -> list[Judgement]:
    """Judge cases with the rule, each different one once, on all cores of this rank.

    Raises:
        RuntimeError: sympy cannot be run.
    """
    different = list(dict.fromkeys(cases))
    # The threads wait for the processes that run sympy; what they compute themselves is little.
    with ThreadPoolExecutor(cores_of_rank()) as threads:
        found = dict(zip(different, threads.map(_judge, different), strict=True))
    return [found[case] for case in cases]


def _judge(case: Case) -> Judgement:
    answer, ground_truth, options = case
    return Judgement(False) if answer is None else judge(answer, ground_truth, options=options)


def with_options(question: str, options: Sequence[str] | None) -> str:
    """A question as a judge sees it, with its options below, a line each."""
    texts = option_texts(options or ())
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(texts)]
    return "\n".join([question, *lines])
