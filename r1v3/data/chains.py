"""Cold-start chains of thought, written by an imperfect teacher and kept by rejection sampling.

The teacher looks at the scans through real classifiers (`digits.reading_probabilities`): a glance
samples every digit from a weak reader's probabilities; where the glance was unsure of what it
read, a careful look follows, opened by "Wait" when it disagrees and by "Hmm" when it weighs two
readings; sums can slip and may be checked the other way round, opened by "Alternatively". The
teacher never sees the labels: chains whose final answer does not match the ground truth are
rejected afterwards, as in the report (section 3.2).
"""

from dataclasses import dataclass

import numpy as np

from r1v3.data.digits import reading_probabilities
from r1v3.data.tasks import LETTERS, TRENDS, Problem
from r1v3.rewards.agreement import agrees

GLANCE_STRENGTH = 0.1
CAREFUL_STRENGTH = 1.0
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the teacher; probabilities in [0, 1].

    glance_sharpness: exponent on the glance's probabilities (1 = as the weak reader has them).
    doubt: a digit glanced with less than this probability is looked at again.
    slip: chance that one column of a sum comes out wrong at first.
    check: chance to check a sum the other way round (a slip is always checked).
    """

    glance_sharpness: float = 1.5
    doubt: float = 0.7
    slip: float = 0.05
    check: float = 0.2


@dataclass(frozen=True)
class Chain:
    """A thought (without think tags), its final answer, and the number of re-checks in it."""

    thought: str
    answer: str
    rechecks: int


def show_rows(rows: tuple[str, ...], sign: str = "") -> str:
    """The reading of a picture as text: `34+58`, or `34, 58, 12`."""
    return sign.join(rows) if sign in ("+", "-") else ", ".join(rows)


def _columns(a: int, b: int, sign: str, slip: int = 0) -> tuple[str, int]:
    """Ones and tens of a sum or difference, written out; `slip` is added to the ones digit."""
    if sign == "-" and a < b:
        return f"{a}-{b}={a - b}.", a - b
    (a10, a1), (b10, b1) = divmod(a, 10), divmod(b, 10)
    if a < 10 and b < 10:
        value = max(0, (a + b if sign == "+" else a - b) + slip)
        return f"{a}{sign}{b}={value}.", value
    if sign == "+":
        ones = max(0, a1 + b1 + slip)
        carry = ones // 10
        first = f"{a1}+{b1}={ones}"
    else:
        carry = int(a1 < b1)
        ones = min(9, max(0, a1 + 10 * carry - b1 + slip))
        first = f"{a1 + 10 * carry}-{b1}={ones}"
    tens = a10 + b10 + carry if sign == "+" else a10 - b10 - carry
    terms = [str(a10)] + [str(v) for v in (b10, carry) if v]
    second = sign.join(terms) + (f"={tens}" if len(terms) > 1 else "")
    return f"Ones: {first}. Tens: {second}.", tens * 10 + ones % 10


def _sign(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


def _run_through(rows: tuple[str, ...], target: str) -> tuple[str, str]:
    """The row of the largest or smallest number, comparing each row with the best so far."""
    wanted, best, steps = ">" if target == "largest" else "<", 0, []
    for i in range(1, len(rows)):
        sign = _sign(int(rows[i]), int(rows[best]))
        comparison = f"{rows[i]}{sign}{rows[best]}"
        best = i if sign == wanted else best
        steps.append(f"{comparison}: row {best + 1}.")
    letter = LETTERS[best]
    return f"{' '.join(steps)} That is {letter}.", letter


def _trend(row: str) -> tuple[str, str]:
    """The comparison of the digits of a row, pair by pair, and the letter of the answer."""
    pairs = [(int(a), int(b)) for a, b in zip(row, row[1:], strict=False)]
    signs = [_sign(a, b) for a, b in pairs]
    trend = {"<": 0, ">": 1}.get(signs[0], 2) if len(set(signs)) == 1 else 2
    steps = ", ".join(f"{a}{sign}{b}" for (a, b), sign in zip(pairs, signs, strict=True))
    return f"{steps}: {TRENDS[trend]}. That is {LETTERS[trend]}.", LETTERS[trend]


def solve(problem: Problem, rows: tuple[str, ...]) -> tuple[str, str]:
    """The worked steps and the answer that follow from a reading of the rows."""
    if problem.domain == "arithmetic":
        steps, value = _columns(int(rows[0]), int(rows[1]), problem.target)
        return f"{steps} So {value}.", str(value)
    if problem.domain == "comparison":
        return _run_through(rows, problem.target)
    if problem.domain == "ordering":
        return _trend(rows[0])
    if problem.domain == "counting":
        counts = [row.count(problem.target) for row in rows]
        total = sum(counts)
        return f"{'+'.join(map(str, counts))}={total}. So {total}.", str(total)
    raise ValueError(f"domain {problem.domain!r} has no worked solution")


def _glance(row: tuple[int, ...], sharpness: float, rng: np.random.Generator) -> tuple[str, float]:
    """A quick reading of one row and the least probability among its digits."""
    text, least = "", 1.0
    for scan in row:
        p = reading_probabilities(GLANCE_STRENGTH)[scan]
        sharp = p**sharpness
        digit = int(rng.choice(10, p=sharp / sharp.sum()))
        text, least = text + str(digit), min(least, float(p[digit]))
    return text, least


def _look_again(
    row: tuple[int, ...], glanced: str, name: str, rng: np.random.Generator
) -> tuple[str, str]:
    """A careful look at one row: the sentence it adds and the reading it ends with."""
    p = reading_probabilities(CAREFUL_STRENGTH)[list(row)]
    careful = "".join(str(rng.choice(10, p=q)) for q in p)
    if careful != glanced:
        return f"Wait, {name} is {careful}.", careful
    doubtful = int(p.max(1).argmin())
    second = str(next(int(d) for d in p[doubtful].argsort()[::-1] if str(d) != careful[doubtful]))
    other = careful[:doubtful] + second + careful[doubtful + 1 :]
    return f"Hmm, {name} is {other} or {careful}. It is {careful}.", careful


def _arithmetic(
    rows: tuple[str, ...], sign: str, config: TeacherConfig, rng: np.random.Generator
) -> tuple[list[str], str, int]:
    """Steps, answer and number of re-checks of a sum that may slip and may be checked."""
    a, b = int(rows[0]), int(rows[1])
    slipped = rng.random() < config.slip
    steps, value = _columns(a, b, sign, int(rng.choice([-1, 1])) if slipped else 0)
    sentences = [steps, f"So {value}."]
    if not slipped and rng.random() >= config.check:
        return sentences, str(value), 0
    back = value - b if sign == "+" else value + b
    check = f"Alternatively, {value}{'-' if sign == '+' else '+'}{b}={back},"
    if back == a:
        return [*sentences, f"{check} it fits."], str(value), 1
    steps, again = _columns(a, b, sign)
    return [*sentences, f"{check} not {a}.", steps, f"So {again}."], str(again), 1


def think(problem: Problem, config: TeacherConfig, rng: np.random.Generator) -> Chain:
    """One chain of thought of the teacher, right or wrong."""
    glances = [_glance(row, config.glance_sharpness, rng) for row in problem.rows]
    rows = [text for text, _ in glances]
    sentences = [f"I see {show_rows(tuple(rows), problem.target)}."]
    rechecks = 0
    for i, (row, (glanced, least)) in enumerate(zip(problem.rows, glances, strict=True)):
        if least < config.doubt:
            name = f"the {ORDINALS[i]}" if len(rows) > 1 else "it"
            sentence, rows[i] = _look_again(row, glanced, name, rng)
            sentences.append(sentence)
            rechecks += 1
    if problem.domain == "arithmetic":
        steps, answer, checks = _arithmetic(tuple(rows), problem.target, config, rng)
        return Chain(" ".join(sentences + steps), answer, rechecks + checks)
    worked, answer = solve(problem, tuple(rows))
    return Chain(" ".join([*sentences, worked]), answer, rechecks)


def sample_chain(
    problem: Problem, config: TeacherConfig, rng: np.random.Generator, tries: int = 4
) -> tuple[Chain | None, int]:
    """The first of at most `tries` chains that ends in the right answer, and the tries used.

    Answers are verified as those of any other teacher are, see `r1v3.distill`.
    """
    for attempt in range(1, tries + 1):
        chain = think(problem, config, rng)
        if agrees(chain.answer, problem.answer, problem.options or ()):
            return chain, attempt
    return None, tries
