r"""Answers as a whole: values, names, lists, sets, tuples, intervals, inequalities, equations.

`read_answer` takes a short answer apart completely or raises `Unreadable`; `answers_agree` compares
two of them. What is understood as the same: `x=3` and `3`; `x=3 or x=-5`, `x_1=3, x_2=-5`, `3, -5`
and `\{3,-5\}`; `3\pm\sqrt2` and the two values; `x>3`, `3<x` and `(3,\infty)`; `1:2` and `1/2`. A
gold `AB=4, CD=5` agrees with `4, 5` in this order, as `x=1, y=2` does with `(1,2)`. An equation
that is not solved is not the solution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from r1v3.rewards.arithmetic import positive, rational
from r1v3.rewards.formula import (
    Token,
    Tree,
    Unreadable,
    free_symbols,
    negative,
    parse_formula,
    tokenize,
)
from r1v3.rewards.notation import tidy, without_full_stop
from r1v3.rewards.symbolic import proved_proportional
from r1v3.rewards.values import Value, parse_value, values_agree

MAX_ITEMS = 24

_DATE = re.compile(r"\d{4}([-/])\d{1,2}\1\d{1,2}|\d{1,2}([-/])\d{1,2}\2\d{4}")


@dataclass(frozen=True)
class Named:
    """`x = 3`: an answer with the name of what it is."""

    name: str
    answer: Answer


@dataclass(frozen=True)
class Several:
    """Answers in any order: `3 or -5`, `3, -5`, `\\{3, -5\\}`, `\\pm 3`.

    `listed`: they stand without braces, and joined by no "or".
    """

    items: tuple[Answer, ...]
    listed: bool = False


@dataclass(frozen=True)
class Sequenced:
    """Answers in order, in brackets (`(1, 2)`) or as a ratio (`1 : 2 : 3`, brackets are colons)."""

    opening: str
    closing: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Interval:
    """Real numbers between two ends, each with whether it belongs to it."""

    low: Value
    high: Value
    closed: tuple[bool, bool]


@dataclass(frozen=True)
class Region:
    """A union of intervals, for the variable `name` if that is said."""

    intervals: tuple[Interval, ...]
    name: str | None = None


@dataclass(frozen=True)
class Relation:
    """Formulas with relations between them that do not define a name or a region."""

    sides: tuple[Tree, ...]
    signs: tuple[str, ...]


Answer = Value | Named | Several | Sequenced | Region | Relation

_INFINITY = Value(("inf",))
_MINUS_INFINITY = Value(negative(("inf",)))
_REALS = Region((Interval(_MINUS_INFINITY, _INFINITY, (False, False)),))
_OR = frozenset(["or", "或", "或者", "lor"])
_AND = frozenset(["and", "和", "与", "及", "以及", "且", "并且", "land"])
_RELATIONS = {
    "=": "=", "==": "=", "approx": "=", "equiv": "=", "<": "<", "lt": "<", ">": ">", "gt": ">",
    "<=": "<=", "le": "<=", "leq": "<=", "leqslant": "<=", ">=": ">=", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "!=": "!=", "ne": "!=", "neq": "!=", "in": "in",
}  # fmt: skip
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_COMMA = frozenset([","])
_OPENING = frozenset([("op", "("), ("op", "["), ("op", "{"), ("cmd", "{")])
_CLOSING = frozenset([("op", ")"), ("op", "]"), ("op", "}"), ("cmd", "}")])


def _depths(tokens: Sequence[Token]) -> list[int]:
    """The number of brackets around each token; a bracket counts as inside itself."""
    depth, found = 0, []
    for token in tokens:
        depth += token[:2] in _OPENING
        found.append(depth)
        depth -= token[:2] in _CLOSING
    if depth:
        raise Unreadable("brackets that do not match")
    return found


def _split(tokens: Sequence[Token], at: Sequence[int]) -> list[list[Token]]:
    bounds = [-1, *at, len(tokens)]
    return [list(tokens[a + 1 : b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def read_answer(text: str) -> Answer:
    """The answer that a text is.

    Raises:
        Unreadable: it is not of a known form, completely.
        Undecided: it has a number that is too large.
    """
    text = without_full_stop(tidy(text))
    if _DATE.fullmatch(text):
        raise Unreadable("a date")
    if len(text) > 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return _read(tokenize(text))


def _read(tokens: Sequence[Token]) -> Answer:
    if not tokens:
        raise Unreadable("empty")
    depths = _depths(tokens)
    top = [i for i, depth in enumerate(depths) if depth == 0]
    marks = [i for i in top if _separator(tokens[i])]
    if marks:
        return _read_list(tokens, marks)
    marks = [i for i in top if tokens[i].kind != "word" and tokens[i].value in _RELATIONS]
    if marks:
        return _read_relation(tokens, marks)
    marks = [i for i in top if tokens[i][:2] == ("cmd", "cup")]
    if marks:
        return Region(tuple(i for part in _split(tokens, marks) for i in _intervals(_read(part))))
    marks = [i for i in top if tokens[i][:2] == ("op", ":")]
    if marks:
        return Sequenced(":", ":", tuple(_read(part) for part in _split(tokens, marks)))
    enclosed = _read_brackets(tokens, depths)
    if enclosed is not None:
        return enclosed
    return _read_value(tokens)


def _read_value(tokens: Sequence[Token]) -> Answer:
    names = [token.value for token in tokens if token.kind == "cmd"]
    if names == ["mathbb"] and [t.value for t in tokens] == ["mathbb", "{", "R", "}"]:
        return _REALS
    if len(tokens) == 1 and tokens[0].value in ("emptyset", "varnothing"):
        return Several(())
    if "pm" in names or "mp" in names:
        return Several((parse_value(tokens, 1), parse_value(tokens, -1)))
    return parse_value(tokens)


def _separator(token: Token) -> bool:
    if token.kind == "op":
        return token.value in (",", ";")
    return token.kind in ("word", "cmd") and (token.value in _OR or token.value in _AND)


def _read_list(tokens: Sequence[Token], marks: Sequence[int]) -> Answer:
    words = {tokens[i].value for i in marks}
    # Sets inside are not searched: parts are read again as a list, which doubles with every level.
    if words & _COMMA and words - _COMMA and ("cmd", "{") not in {t[:2] for t in tokens}:
        solutions = _read_solutions(tokens, marks)
        if solutions is not None:
            return solutions
    parts = _split(tokens, marks)
    parts = [p for i, p in enumerate(parts) if p or not 0 < i < len(parts) - 1 or not words - {","}]
    if len(parts) > MAX_ITEMS or not all(parts):
        raise Unreadable("a list with gaps, or too long")
    items = [_read(part) for part in parts]
    regions = [item for item in items if isinstance(item, Region)]
    if len(regions) == len(items):
        return _combine(regions, words)
    named = [item for item in items if isinstance(item, Named)]
    if len(named) == len(items):
        bases = {re.sub(r"_.*", "", item.name) for item in named}
        full = [item.name for item in named]
        if len(bases) == 1 and (len(set(full)) == len(full) or len(set(full)) == 1):
            return Named(bases.pop(), Several(tuple(item.answer for item in named)))
        return Several(tuple(items), listed=not words & _OR)
    if len(named) == 1 and isinstance(items[0], Named):
        first = items[0].answer
        if isinstance(first, Value) or (
            isinstance(first, Sequenced) and all(isinstance(i, Sequenced) for i in items[1:])
        ):
            return Named(items[0].name, Several((first, *items[1:])))
    return Several(tuple(items), listed=not words & _OR)


def _read_solutions(tokens: Sequence[Token], marks: Sequence[int]) -> Several | None:
    """`x=1, y=2; x=3, y=4`: several solutions that each name the same unknowns."""
    outer = [i for i in marks if tokens[i].value not in _COMMA]
    parts = _split(tokens, outer)
    if not all(parts) or len(parts) > MAX_ITEMS:
        return None
    solutions = tuple(_read(part) for part in parts)
    names = [_named_items(solution) for solution in solutions]
    if any(items is None or set(items) != set(names[0] or {}) for items in names):
        return None
    return Several(solutions)


def _named_items(answer: Answer) -> dict[str, Answer] | None:
    """Name and answer of each part of `x=1, y=2` or `(x, y) = (1, 2)`, in this order."""
    if isinstance(answer, Several) and len(answer.items) > 1:
        named = {item.name: item.answer for item in answer.items if isinstance(item, Named)}
        return named if len(named) == len(answer.items) else None
    if isinstance(answer, Named) and isinstance(answer.answer, Sequenced):
        names, items = answer.name[1:-1].split(","), answer.answer.items
        bracketed = answer.name[0] == "(" and answer.answer.opening == "("
        if bracketed and all(names) and len(set(names)) == len(items) == len(names):
            return dict(zip(names, items, strict=True))
    return None


def _combine(regions: Sequence[Region], words: set[str]) -> Answer:
    """`x<1 or x>2` is a union; `x>1 and x<3` is what both have in common."""
    names = {region.name for region in regions} - {None}
    if len(names) > 1:
        return Several(tuple(regions))
    intervals = tuple(i for region in regions for i in region.intervals)
    name = names.pop() if names else None
    if words <= _OR:
        return Region(intervals, name)
    if words <= _AND and len(regions) == len(intervals) == 2:
        for a, b in (intervals, intervals[::-1]):
            if a.high == _INFINITY and b.low == _MINUS_INFINITY:
                return Region((Interval(a.low, b.high, (a.closed[0], b.closed[1])),), name)
    return Several(tuple(regions))


def _intervals(answer: Answer) -> tuple[Interval, ...]:
    """The parts of a union that an answer is: intervals, regions, sets of points."""
    if isinstance(answer, Region):
        return answer.intervals
    if isinstance(answer, Sequenced) and len(answer.items) == 2 and answer.opening in "([":
        low, high = answer.items
        if isinstance(low, Value) and isinstance(high, Value):
            return (Interval(low, high, (answer.opening == "[", answer.closing == "]")),)
    if isinstance(answer, Several):
        points = [item for item in answer.items if isinstance(item, Value)]
        if len(points) == len(answer.items):
            return tuple(Interval(point, point, (True, True)) for point in points)
    raise Unreadable("not a set of real numbers")


def _read_brackets(tokens: Sequence[Token], depths: Sequence[int]) -> Answer | None:
    """A set, tuple or interval that the tokens are as a whole, or None."""
    start = 0
    if len(tokens) > 2 and tokens[0].kind == "word" and tokens[1][:2] == ("op", "("):
        start = 1  # A(1, 2) is the point A
    if tokens[start][:2] not in _OPENING or tokens[-1][:2] not in _CLOSING:
        return None
    if any(depth == 0 for depth in depths[start:]) or any(
        depth == 1 and token[:2] in _CLOSING
        for token, depth in zip(tokens[start:-1], depths[start:-1], strict=True)
    ):
        return None
    opening, closing = tokens[start], tokens[-1]
    inner, inside = tokens[start + 1 : -1], [depth - 1 for depth in depths[start + 1 : -1]]
    marks = [i for i, d in enumerate(inside) if d == 0 and inner[i][:2] in _COMMAS]
    if opening.kind == "cmd" and closing.kind == "cmd" and start == 0:
        bars = [i for i, d in enumerate(inside) if d == 0 and inner[i].value in ("|", "mid", ":")]
        if len(bars) == 1 and any(token.value in _RELATIONS for token in inner):
            return _read(inner[bars[0] + 1 :])
        if not inner:
            return Several(())
        found = _read(inner)
        return Several(found.items if isinstance(found, Several) and found.items else (found,))
    if not marks or opening.kind == "cmd" or closing.kind == "cmd":
        return None
    if opening.value == "{":  # a set whose braces lost their backslashes
        return Several(tuple(_read(p) for p in _split(inner, marks)))
    items = tuple(_read(part) for part in _split(inner, marks))
    sequence = Sequenced(opening.value, closing.value, items)
    return Named(tokens[0].value, sequence) if start else sequence


_COORDINATES = ({"x", "y"}, {"x", "y", "z"})
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_FUNCTION_VALUE = re.compile(r"[fghFG]\([a-z]\)")
_COMMAS = frozenset([("op", ","), ("op", ";")])


def _name(tokens: Sequence[Token]) -> str | None:
    """The name on the left of an equals sign: `x`, `f(x)`, `AB`, `\\angle A`, `\\text{Area}`."""
    key = "".join(token.value for token in tokens)
    if not any(token.kind in ("word", "cmd") for token in tokens) or len(key) > 60:
        return None
    if tokens[0].kind == "word" and len(tokens) == 1:
        return key
    if any(token.kind == "num" or token.value in "+-*/^!" for token in _outside_index(tokens)):
        return None
    formula = any(token.value in ("frac", "sqrt") for token in tokens)
    segments = all(token.value.isupper() for token in tokens if token.kind == "word")
    return None if formula and not segments else key


def _outside_index(tokens: Sequence[Token]) -> list[Token]:
    kept, depth, skipping = [], 0, False
    for i, token in enumerate(tokens):
        if i and tokens[i - 1][:2] == ("op", "_") and not skipping:
            skipping, depth = True, 0
        if skipping:
            depth += (token[:2] == ("op", "{")) - (token[:2] == ("op", "}"))
            skipping = depth > 0
            continue
        kept.append(token)
    return kept


def _read_relation(tokens: Sequence[Token], marks: Sequence[int]) -> Answer:
    signs = [_RELATIONS[tokens[i].value] for i in marks]
    parts = _split(tokens, marks)
    if not all(parts[1:]):
        raise Unreadable("a relation without a side")
    if not parts[0]:
        if signs == ["="]:  # "= 5" and "\approx 5"
            return _read(parts[1])
        raise Unreadable("a relation without a side")
    if signs == ["in"]:
        name, answer = _name(parts[0]), _read(parts[1])
        if name is None:
            raise Unreadable("a formula in a set")
        if isinstance(answer, Several):
            return Named(name, answer)
        if isinstance(answer, Value) and answer.tree[0] == "sym":
            return Relation((("sym", name), answer.tree), ("in",))
        return Region(_intervals(answer), name)
    if set(signs) == {"="}:
        return _read_equation(parts)
    if "in" in signs or ("=" in signs):
        raise Unreadable("mixed relations")
    return _read_inequality(parts, signs)


def _read_equation(parts: Sequence[Sequence[Token]]) -> Answer:
    name = _name(parts[0])
    if name is None and len(parts) == 2:
        sides = (parse_formula(parts[0]), parse_formula(parts[1]))
        if any(free_symbols(side) for side in sides):
            return Relation(sides, ("=",))
    members = [_read(part) for part in (parts if name is None else parts[1:])]
    for one, other in zip(members, members[1:], strict=False):
        if not answers_agree(one, other):
            raise Unreadable("an equation that does not hold")
    exact = [m for m in members if not (isinstance(m, Value) and m.digits)]
    answer = (exact or members)[0]
    return answer if name is None else Named(name, answer)


def _compared(tokens: Sequence[Token]) -> Value:
    """A side of an inequality; `f(x)` is one unknown, no product."""
    key = "".join(token.value for token in tokens)
    if len(tokens) == 4 and _FUNCTION_VALUE.fullmatch(key):
        return Value(("sym", key))
    return parse_value(tokens)


def _read_inequality(parts: Sequence[Sequence[Token]], signs: list[str]) -> Answer:
    values = [_compared(part) for part in parts]
    if len(values) == 2 and any(v.tree[:2] == ("*", ("num", "-1")) for v in values):
        if all(len(v.tree) == 3 or rational(v.tree) is not None for v in values):
            values = [replace(v, tree=_opposite(v.tree)) for v in values]
            signs = [_MIRRORED[signs[0]]]
    bare = [i for i, v in enumerate(values) if v.tree[0] == "sym" and v.unit is None]
    if len(bare) == 1 and len(values) in (2, 3):
        i, name = bare[0], values[bare[0]].tree[1]
        others = [value for k, value in enumerate(values) if k != i]
        if not any(name in free_symbols(value.tree) for value in others):
            found = _bounds(values, signs, i)
            if found is not None:
                return Region(found, name)
    distance = _read_distance(values, signs)
    if distance is not None:
        return distance
    return Relation(tuple(value.tree for value in values), tuple(signs))


def _read_distance(values: list[Value], signs: list[str]) -> Region | None:
    """`|x|<3` and `1\\le|x|<2` for a real x; z and w may be complex, and are left as they are."""
    bars = [i for i, v in enumerate(values) if v.tree[0] == "abs" and v.unit is None]
    if len(bars) != 1 or len(values) not in (2, 3):
        return None
    i, inner = bars[0], values[bars[0]].tree[1]
    ends = [value for k, value in enumerate(values) if k != i]
    if inner[0] != "sym" or inner[1] in ("z", "w") or "!=" in signs:
        return None
    if any(end.unit is not None or not positive(end.tree) for end in ends):
        return None
    found = _bounds(values, signs, i)
    if found is None:
        return None
    low, high, (low_closed, high_closed) = found[0].low, found[0].high, found[0].closed
    if low == _MINUS_INFINITY:
        mirrored = replace(high, tree=negative(high.tree))
        return Region((Interval(mirrored, high, (high_closed, high_closed)),), inner[1])
    far = _MINUS_INFINITY if high == _INFINITY else replace(high, tree=negative(high.tree))
    near = replace(low, tree=negative(low.tree))
    below = Interval(far, near, (high_closed, low_closed))
    return Region((below, found[0]), inner[1])


def _opposite(tree: Tree) -> Tree:
    return tree[2] if tree[:2] == ("*", ("num", "-1")) and len(tree) == 3 else negative(tree)


def _bounds(values: list[Value], signs: list[str], i: int) -> tuple[Interval, ...] | None:
    """The intervals that `values[i]` may lie in, from the relations beside it."""
    if len(values) == 2:
        sign, end = (signs[0], values[1]) if i == 0 else (_MIRRORED[signs[0]], values[0])
        if sign == "!=":
            below = Interval(_MINUS_INFINITY, end, (False, False))
            return below, Interval(end, _INFINITY, (False, False))
        if sign in ("<", "<="):
            return (Interval(_MINUS_INFINITY, end, (False, sign == "<=")),)
        return (Interval(end, _INFINITY, (sign == ">=", False)),)
    if i != 1:
        return None
    low, high, left, right = values[0], values[2], signs[0], signs[1]
    if left in (">", ">=") and right in (">", ">="):
        low, high, left, right = high, low, _MIRRORED[right], _MIRRORED[left]
    if left in ("<", "<=") and right in ("<", "<="):
        return (Interval(low, high, (left == "<=", right == "<=")),)
    return None


def _matched(gold: Sequence[object], answer: Sequence[object], agree: Callable[..., bool]) -> bool:
    """Whether the items pair off, whatever their order."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        for i, candidate in enumerate(left):
            if agree(item, candidate):
                del left[i]
                break
        else:
            return False
    return True


def _intervals_agree(gold: Interval, answer: Interval) -> bool:
    return (
        gold.closed == answer.closed
        and values_agree(gold.low, answer.low)
        and values_agree(gold.high, answer.high)
    )


def _ratio(answer: Sequenced) -> list[Tree]:
    trees = [item.tree for item in answer.items if isinstance(item, Value) and item.unit is None]
    if len(trees) != len(answer.items):
        raise Unreadable("a ratio of no numbers")
    return trees


def _sequences_agree(gold: Sequenced, answer: Sequenced) -> bool:
    if (gold.opening, gold.closing) != (answer.opening, answer.closing):
        return False
    if len(gold.items) != len(answer.items):
        return False
    if gold.opening != ":":
        return all(answers_agree(a, b) for a, b in zip(gold.items, answer.items, strict=True))
    first, second = _ratio(gold), _ratio(answer)
    return all(
        values_agree(Value(("*", a, second[0])), Value(("*", b, first[0])))
        for a, b in zip(first[1:], second[1:], strict=True)
    )


def _difference(answer: Answer) -> tuple[str, Tree] | None:
    """Sign and left minus right side of an equation or inequality in two sides."""
    if isinstance(answer, Relation) and len(answer.sides) == 2:
        return answer.signs[0], ("+", answer.sides[0], negative(answer.sides[1]))
    if isinstance(answer, Named) and isinstance(answer.answer, Value):
        left = parse_formula(tokenize(answer.name))
        return "=", ("+", left, negative(answer.answer.tree))
    return None


def _relations_agree(gold: Answer, answer: Answer) -> bool:
    """Equations that are multiples of one another, and chains of the same formulas."""
    if isinstance(gold, Relation) and isinstance(answer, Relation) and gold.signs != ("=",):
        turned = (answer.sides[::-1], tuple(_MIRRORED.get(s, "") for s in answer.signs[::-1]))
        for sides, signs in ((answer.sides, answer.signs), turned):
            if signs == gold.signs and len(sides) == len(gold.sides):
                pairs = zip(gold.sides, sides, strict=True)
                if all(values_agree(Value(a), Value(b)) for a, b in pairs):
                    return True
        return False
    first, second = _difference(gold), _difference(answer)
    if first is None or second is None or first[0] != "=" or second[0] != "=":
        return False
    if len(free_symbols(first[1])) < 2:
        return first[1] == second[1]
    return proved_proportional(first[1], second[1])


def _plain(answer: Answer) -> Answer:
    """A set of one is its element, a ratio of two is their quotient."""
    if isinstance(answer, Several) and len(answer.items) == 1 and answer.items != (Several(()),):
        return answer.items[0]
    return answer


def _named_agree(gold: Named, answer: Named) -> bool:
    if _same_name(gold.name, answer.name):
        return answers_agree(gold.answer, answer.answer)
    return _relations_agree(gold, answer)


def _same_name(first: str, second: str) -> bool:
    return first == second or {first, second} == {"y", "f(x)"}


def answers_agree(gold: Answer, answer: Answer) -> bool:
    """Whether two answers mean the same (module docstring).

    Raises:
        Undecided: neither could be shown.
        Unreadable: a part is not defined.
    """
    gold, answer = _plain(gold), _plain(answer)
    named = _named_items(gold)
    if named is not None and not isinstance(answer, Relation):
        return _named_items_agree(gold, named, answer)
    if isinstance(gold, Value) and isinstance(answer, Value):
        return values_agree(gold, answer)
    if isinstance(gold, Sequenced) and (gold.opening, gold.closing) == ("(", ")"):
        given = _named_items(answer)
        if given is not None and set(given) in _COORDINATES:
            answer = Sequenced("(", ")", tuple(given[name] for name in sorted(given)))
    if isinstance(gold, Named) and isinstance(answer, Named):
        return _named_agree(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations_agree(gold, answer)
    if isinstance(gold, Named):
        return answers_agree(gold.answer, answer)
    if isinstance(answer, Named):
        return answers_agree(gold, answer.answer)
    if gold == _REALS and isinstance(answer, Value) and answer.tree == ("sym", "R"):
        return True
    if isinstance(gold, Region) or isinstance(answer, Region):
        return _regions_agree(gold, answer)
    if isinstance(gold, Several) and isinstance(answer, Several):
        mixed = [any(isinstance(i, Named) for i in several.items) for several in (gold, answer)]
        if mixed[0] != mixed[1]:
            return False  # x = 1, y = 2 is not the set of 1 and 2
        return _matched(gold.items, answer.items, answers_agree)
    if isinstance(gold, Sequenced) and isinstance(answer, Sequenced):
        return _sequences_agree(gold, answer)
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Sequenced) and one.opening == ":" and isinstance(other, Value):
            trees = _ratio(one)
            return len(trees) == 2 and values_agree(Value(("/", *trees)), other)
    return False


def _named_items_agree(gold: Answer, named: dict[str, Answer], answer: Answer) -> bool:
    """`x=1, y=2` against names and values in any order, or the bare values in the same order."""
    given = _named_items(answer)
    if given is not None:
        return _matched(list(named.items()), list(given.items()), _pairs_agree)
    if isinstance(gold, Named) and isinstance(answer, Named):
        return _named_agree(gold, answer)
    bracketed = isinstance(answer, Sequenced) and (answer.opening, answer.closing) == ("(", ")")
    if not bracketed and not (isinstance(answer, Several) and answer.listed):
        return False
    assert isinstance(answer, Several | Sequenced)
    letters = "".join(sorted(named))
    if len(letters) == len(named) and letters in _ALPHABET and list(named) != sorted(named):
        return False  # y=2, x=1: "2, 1" would be read as x, y
    if len(answer.items) != len(named) or any(isinstance(item, Named) for item in answer.items):
        return False
    pairs = zip(named.values(), answer.items, strict=True)
    return all(answers_agree(one, other) for one, other in pairs)


def _pairs_agree(gold: tuple[str, Answer], answer: tuple[str, Answer]) -> bool:
    return _named_agree(Named(*gold), Named(*answer))


def _regions_agree(gold: Answer, answer: Answer) -> bool:
    names = [a.name for a in (gold, answer) if isinstance(a, Region) and a.name is not None]
    if len(names) == 2 and not _same_name(*names):
        return False
    try:
        first, second = _intervals(gold), _intervals(answer)
    except Unreadable:
        return False
    return _matched(first, second, _intervals_agree)
