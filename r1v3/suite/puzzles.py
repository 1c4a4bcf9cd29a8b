"""Checks of the puzzles in MME-Reasoning, whose answer is any that keeps the rules.

A `Check` takes the final text, the answer cell and the further information of a row, and returns
True or False, or None where no answer of its form can be read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from r1v3.suite.arithmetic import left_side, numbers, same_formula, value
from r1v3.suite.table import read_value

Check = Callable[[str, Any, Any], bool | None]
Grid = list[list[Any]]

_PAIR = re.compile(r"\"?'?\b([A-Za-z]|\d{1,2})\b\"?'?\s*(?:[:=]|->|→|is)\s*\"?'?(\w{1,12})")
_PLACE = re.compile(
    r"\(\s*\"?'?([A-Za-z]|\d{1,2})\"?'?\s*,\s*\"?'?([A-Za-z]|\d{1,2})\"?'?\s*\)"
    r"|\"row\"\s*:\s*\"?(\w+)\"?\s*,\s*\"column\"\s*:\s*\"?(\w+)\"?"
)
_MATRIX = re.compile(r"\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*\s*\]")
_BRIDGE = re.compile(r"\b([a-z]\d{1,2})\b\s*(?:-|–|to|and|,|→|->)\s*\b([a-z]\d{1,2})\b")
_COUNTED = re.compile(r"\b(one|two|single|double|1|2)\b", re.IGNORECASE)
_ONE_OR_TWO = {"one": 1, "single": 1, "1": 1, "two": 2, "double": 2, "2": 2}


def read_pairs(text: str) -> dict[str, Any]:
    """`A:5, B=1`: names and what is given to them, the last one of each."""
    return {name: int(v) if v.isdecimal() else v for name, v in _PAIR.findall(text)}


def read_grid(text: str) -> Grid | None:
    """The last matrix in a text."""
    found = _MATRIX.findall(text)
    grid = read_value(found[-1]) if found else None
    return grid if isinstance(grid, list) else None


def _sums(keys: str, lines: str, total: int, values: Sequence[int] | None, unique: bool) -> Check:
    """Letters that lie on lines of an equal sum.

    Args:
        lines: letters of each line.
        values: what a letter may be; with `unique`, all of them, each once.
    """

    def check(text: str, answer: Any, info: Any) -> bool | None:
        given = read_pairs(text)
        if not given:
            return None
        if any(not isinstance(given.get(key), int) for key in keys):
            return False
        chosen = [given[key] for key in keys]
        if values is not None and not set(chosen) <= set(values):
            return False
        if unique and len(set(chosen)) < len(chosen):
            return False
        return all(sum(given[letter] for letter in line) == total for line in lines.split())

    return check


def _ratios(text: str, answer: Any, info: Any) -> bool | None:
    given = read_pairs(text)
    if not all(isinstance(given.get(key), int) for key in "ABC"):
        return False if given else None
    return given["B"] != 0 and given["A"] == 3 * given["B"] and given["C"] == 2 * given["B"]


def _few_weights(text: str, answer: Any, info: Any) -> bool | None:
    lines = "ABC AGO OPQ CKQ ADINQ CFILO BEIMP GHIJK"
    found = _sums("ABCDEFGHIJKLMNOPQ", lines, 55, (5, 10, 15, 20), False)(text, answer, info)
    if not found:
        return found
    given = read_pairs(text)
    used = Counter(given[key] for key in "ABCDEFGHIJKLMNOPQ")
    return all(used[weight] <= most for weight, most in ((20, 5), (15, 3), (10, 3), (5, 6)))


def _undecidable(text: str, answer: Any, info: Any) -> bool | None:
    """No verdict: the published conditions contradict each other, so that nothing meets them.

    Number 8 wants B + D + E = B + E + H with D other than H; number 11 wants a 1 that no line of
    its sum can hold.
    """
    return None


def _triangle(text: str, answer: Any, info: Any) -> bool | None:
    given = read_pairs(text)
    if not given:
        return None
    if {given.get(key) for key in "ABCDEF"} != set(range(1, 7)):
        return False
    sums = {sum(given[key] for key in line) for line in ("ABD", "DEF", "ACF")}
    return len(sums) == 1


def _cats_and_dogs(text: str, answer: Any, info: Any) -> bool | None:
    given = read_pairs(text)
    if not given:
        return None
    if any(not isinstance(given.get(key), int) or given[key] > 9 for key in "CATDOGPES"):
        return False

    def number(word: str) -> int:
        return int("".join(str(given[letter]) for letter in word))

    return number("CAT") + number("DOG") == number("PETS")


def _pairs(text: str, answer: Any, info: Any) -> bool | None:
    """Names and values equal to the answer's."""
    given = {key.upper(): str(v).upper() for key, v in read_pairs(text).items()}
    if not given or not isinstance(answer, dict) or not answer:
        return None
    return all(given.get(str(key).upper()) == str(v).upper() for key, v in answer.items())


def _coordinates(text: str, answer: Any, info: Any) -> bool | None:
    """Places in the answer's order."""
    wanted = [answer] if isinstance(answer, dict) else answer
    found = [(a or c) + (b or d) for a, b, c, d in _PLACE.findall(text)]
    if not found or not isinstance(wanted, list):
        return None
    named = [f"{place.get('row')}{place.get('column')}" for place in wanted]
    return [place.upper() for place in found] == [place.upper() for place in named]


def _one_of(text: str, answer: Any, info: Any) -> bool | None:
    """A set of letters or numbers that is one of the answers."""
    if not isinstance(answer, list) or not answer:
        return None
    last = text.strip().splitlines()[-1] if text.strip() else ""
    found = set(re.findall(r"\b(?:[A-Z]|\d{1,3})\b", last.rpartition(":")[2]))
    if not found:
        return None
    wanted = [set(map(str, one)) if isinstance(one, list) else {str(one)} for one in answer]
    return found in wanted


def _equation(text: str, answer: Any, info: Any) -> bool | None:
    """A formula that is one of the answers but for the order of its terms."""
    given = _formula(text)
    if given is None or not isinstance(answer, list):
        return None
    wanted = [tree for one in answer if (tree := left_side(str(one))) is not None]
    return any(same_formula(given, tree) for tree in wanted)


def _formula(text: str) -> Any:
    """The last formula in a text, with what stands behind its last colon or "is" first."""
    for line in reversed(text.strip().splitlines()):
        for part in (line, line.rpartition(":")[2], line.rpartition(" is ")[2]):
            tree = left_side(part.strip().strip("*`.$ ").removeprefix("\\(").removesuffix("\\)"))
            if tree is not None and len(numbers(tree)) > 1:
                return tree
    return None


def _points_24(text: str, answer: Any, info: Any) -> bool | None:
    """A formula of the four cards, each once, that is 24."""
    cards = info.get("init_cards") if isinstance(info, dict) else None
    faces = {"A": "1", "J": "11", "Q": "12", "K": "13"}
    tree = _formula(re.sub(r"\b[AJQK]\b", lambda face: faces[face[0]], text))
    if tree is None or not isinstance(cards, list):
        return None
    return value(tree) == 24 and numbers(tree) == sorted(int(card) for card in cards)


def _bridges(text: str) -> list[tuple[str, str, int]]:
    told = read_value(text.strip().strip("`").removeprefix("json"))
    if isinstance(told, list) and all(isinstance(one, dict) for one in told):
        return [
            (str(one.get("start")), str(one.get("end")), number)
            for one in told
            if isinstance(number := one.get("number"), int)
        ]
    return [bridge for line in text.lower().splitlines() for bridge in _bridges_in(line)]


def _bridges_in(line: str) -> list[tuple[str, str, int]]:
    """Bridges that a line tells, all with their number in front, or all with it behind."""
    matches = list(_BRIDGE.finditer(line))
    if not matches:
        return []
    edges = [0, *(edge for match in matches for edge in match.span()), len(line)]
    in_front = _COUNTED.search(line, 0, edges[1]) is not None
    found = []
    for i, match in enumerate(matches):
        start = 2 * i if in_front else 2 * i + 2
        counted = _COUNTED.search(line, edges[start], edges[start + 1])
        if counted is not None:
            found.append((match[1], match[2], _ONE_OR_TWO[counted[1]]))
    return found


def _hashi(text: str, answer: Any, info: Any) -> bool | None:
    """Bridges between islands: straight, at most two, as many as an island says, none crossing."""
    bridges = _bridges(text)
    islands = info.get("init_islands") if isinstance(info, dict) else None
    if not bridges or not isinstance(islands, list):
        return None
    wanted = {str(one["cord"]): int(one["requirement"]) for one in islands}
    ends: Counter[str] = Counter()
    doubled: Counter[frozenset[str]] = Counter()
    crossed: defaultdict[tuple[int, int], set[bool]] = defaultdict(set)
    for start, end, number in bridges:
        if start == end or start not in wanted or end not in wanted or number < 1:
            return False
        (x, y), (u, v) = ((ord(place[0]), int(place[1:])) for place in (start, end))
        if x != u and y != v:
            return False
        ends[start] += number
        ends[end] += number
        doubled[frozenset((start, end))] += number
        if doubled[frozenset((start, end))] == number:
            cells = [(x, i) for i in range(min(y, v) + 1, max(y, v))] if x == u else []
            cells += [(i, y) for i in range(min(x, u) + 1, max(x, u))] if y == v else []
            for cell in cells:
                if crossed[cell] or f"{chr(cell[0])}{cell[1]}" in wanted:
                    return False
                crossed[cell].add(x == u)
    return max(doubled.values()) <= 2 and all(ends[place] == n for place, n in wanted.items())


def _kept(grid: Grid, info: Any, size: int) -> bool:
    """Whether a grid has its size and all numbers that were given."""
    base = info.get("base_matrix") if isinstance(info, dict) else None
    if len(grid) != size or any(not isinstance(row, list) or len(row) != size for row in grid):
        return False
    return base is not None and all(
        was is None or was == now
        for row, now_row in zip(base, grid, strict=False)
        for was, now in zip(row, now_row, strict=False)
    )


def _latin(grid: Grid, numbers_: set[int]) -> bool:
    """Whether every row and column holds each number once."""
    try:
        return all(set(line) == numbers_ for line in (*grid, *zip(*grid, strict=True)))
    except TypeError:
        return False


def _sudoku(size: int, width: int) -> Check:
    """Rows, columns and boxes of 2 x `width` hold each number once."""

    def check(text: str, answer: Any, info: Any) -> bool | None:
        grid = read_grid(text)
        if grid is None:
            return None
        wanted = set(range(1, size + 1))
        if not _kept(grid, info, size) or not _latin(grid, wanted):
            return False
        boxes = (
            {grid[top + r][left + c] for r in range(2) for c in range(width)}
            for top in range(0, size, 2)
            for left in range(0, size, width)
        )
        return all(box == wanted for box in boxes)

    return check


def _skyscraper(text: str, answer: Any, info: Any) -> bool | None:
    """Heights of which as many are seen from each side as it says: top, left, right, bottom."""
    grid = read_grid(text)
    seen = info.get("visible_skyscrapers") if isinstance(info, dict) else None
    if grid is None or not isinstance(seen, list) or len(seen) != 4:
        return None
    size = len(info.get("base_matrix") or ())
    if not _kept(grid, info, size) or not _latin(grid, set(range(1, size + 1))):
        return False
    columns = [list(column) for column in zip(*grid, strict=True)]
    views = (columns, grid, [row[::-1] for row in grid], [one[::-1] for one in columns])
    return all(
        wanted is None or wanted == sum(h > max(line[:i], default=0) for i, h in enumerate(line))
        for lines, side in zip(views, seen, strict=True)
        for line, wanted in zip(lines, side, strict=False)
    )


def _yin_yang(text: str, answer: Any, info: Any) -> bool | None:
    """Two colors, each in one piece, and no 2 x 2 block of one color."""
    grid = read_grid(text)
    if grid is None:
        return None
    if not _kept(grid, info, 6) or any(cell not in (0, 1) for row in grid for cell in row):
        return False
    for r in range(5):
        for c in range(5):
            if grid[r][c] == grid[r][c + 1] == grid[r + 1][c] == grid[r + 1][c + 1]:
                return False
    return all(_in_one_piece(grid, color) for color in (0, 1))


def _in_one_piece(grid: Grid, color: int) -> bool:
    cells = {(r, c) for r in range(6) for c in range(6) if grid[r][c] == color}
    reached: set[tuple[int, int]] = set()
    edge = list(cells)[:1]
    while edge:
        r, c = edge.pop()
        if (r, c) in cells - reached:
            reached.add((r, c))
            edge += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    return reached == cells


def _all(last: int) -> range:
    return range(1, last + 1)


_SPOKES = "AJS CJQ EJO GJM IJK LJH NJF PJD RJB"
_STAR = "ABC ADH AEJ CFJ CGL HIJ HMQ JKL JNQ JOS LPS QRS"
CHECKS: dict[str, Check] = {
    "calculate_answer_function_1": _ratios,
    "calculate_answer_function_2": _sums("ABCDEF", "ABC CEF ADF", 25, None, False),
    "calculate_answer_function_3": _sums(
        "ABCDEFGHIJKLMNO", "ADEH CEGH IGJH NMJH OMHL KLHF BFHD", 30, _all(15), True
    ),
    "calculate_answer_function_4": _sums(
        "ABCDEFGHI", "ABED BCEF DEGH EFHI BDHF ACIG", 20, _all(9), True
    ),
    "calculate_answer_function_5": _few_weights,
    "calculate_answer_function_6": _sums("ABCDEFGHIJKLMNOPQRS", _SPOKES, 30, _all(19), True),
    "calculate_answer_function_7": _sums(
        "ABCDEFGHIJKL", "ACFH ADGK BCDE HIJK BFIL EGJL", 26, _all(12), True
    ),
    "calculate_answer_function_8": _undecidable,
    "calculate_answer_function_9": _sums("ABCDEFGHIJKLMNOPQRS", _STAR, 22, _all(19), True),
    "calculate_answer_function_10": _triangle,
    "calculate_answer_function_11": _undecidable,
    "calculate_answer_function_12": _cats_and_dogs,
    "match_answer_function": _pairs,
    "multiple_match_function": _one_of,
    "compare_expression_function": _equation,
    "match_coordinate_function": _coordinates,
    "calculate_answer_function_hashi": _hashi,
    "calculate_answer_function_skyscraper": _skyscraper,
    "calculate_answer_function_sudoku_4": _sudoku(4, 2),
    "calculate_answer_function_sudoku_6": _sudoku(6, 3),
    "calculate_answer_function_yinyang": _yin_yang,
    "judge_24points_function": _points_24,
}
