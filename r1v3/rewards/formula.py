r"""A strict parser of short formulas, in LaTeX or plain text, to expression trees.

It reads a formula completely or raises `Unreadable`: no letter, word or sign is ever skipped.
Trees are tuples that JSON can carry, so that no text of a completion ever reaches sympy:

    ("num", "3/4")  ("sym", "x_1")  ("pi",) ("e",) ("i",) ("inf",)
    ("+", a, b, ...)  ("*", a, b, ...)  ("/", a, b)  ("^", a, b)  ("root", n, a)
    ("fun", "sin", a)  ("log", base, a)  ("abs", a)  ("!", a)  ("binom", n, k)
    ("matrix", row length, a, b, ...)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

MAX_TOKENS = 240
MAX_DEPTH = 24
MAX_DIGITS = 600

Tree = tuple[Any, ...]


class Unreadable(ValueError):
    """The text is no formula of the grammar."""


class Token(NamedTuple):
    """`kind` is num, word, cmd or op; `spaced`: space before it; `text`: from inside `\\text{}`."""

    kind: str
    value: str
    spaced: bool = False
    text: bool = False


_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<num>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.A-Za-z]))?)|\\(?P<cmd>[A-Za-z]+|[{}|%\\])"
    r"|(?P<word>[^\W\d_])|(?P<op>\*\*|<=|>=|!=|==|[-+*/^_(){}\[\]|=<>,;:!'%&.])"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED_GROUPS = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_FONTS = frozenset(
    "text textbf textit textrm textnormal textsf mathrm mathbf mathit mathsf mbox hbox rm bf bm "
    "boldsymbol operatorname".split()
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp ln lg log arctg arcctg tg ctg "
    "sgn max min gcd lcm".split()
)
_SAME_FUNCTION = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "asin": "arcsin",
                  "acos": "arccos", "atan": "arctan", "cosec": "csc"}  # fmt: skip
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_SYMBOLS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi "
    "Psi Omega ell hbar".split()
)
_SAME_SYMBOL = {"varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta"}
_DECORATIONS = frozenset(
    "overline bar vec hat widehat tilde widetilde overrightarrow overleftrightarrow dot ddot "
    "mathbb mathcal mathfrak mathscr angle triangle parallel odot".split()
)
_SAME_DECORATION = {"overrightarrow": "vec", "bar": "overline"}
_WORDS = {"pi": "pi", "sqrt": "sqrt", "infinity": "infty", "inf": "infty", "oo": "infty"}
_SIGNS = {("op", "+"): 1, ("op", "-"): -1}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def tokenize(text: str) -> list[Token]:
    """Tokens of tidied text.

    Raises:
        Unreadable: a character of no token, or more than 240 tokens.
    """
    if _SPACED_GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    text = _join_groups(text.replace("{,}", ""))
    tokens: list[Token] = []
    position, spaced, fonts, depth = 0, False, [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) >= MAX_TOKENS:
            raise Unreadable("a character of no formula" if match is None else "too long")
        position = match.end()
        kind, value = str(match.lastgroup), match[match.lastgroup or 0]
        if kind == "space":
            spaced = True
            continue
        if kind == "cmd" and value in _FONTS:
            opened = re.match(r"\s*\{", text[position : position + 8])
            if opened is not None:
                position += opened.end()
                depth += 1
                fonts.append(depth)
                spaced = spaced or value not in ("operatorname", "mathrm", "mathbf", "bm")
                continue
        if (kind, value) == ("op", "{"):
            depth += 1
        elif (kind, value) == ("op", "}"):
            closes_font = bool(fonts) and fonts[-1] == depth
            depth -= 1
            if closes_font:
                fonts.pop()
                continue
        inside = bool(fonts)
        if kind == "word" and tokens and tokens[-1].kind == "word" and not spaced:
            last = tokens[-1]
            if last.text == inside and last.value.isascii() == value.isascii():
                tokens[-1] = last._replace(value=last.value + value)
                continue
        tokens.append(Token(kind, value, spaced or (inside and kind == "word"), inside))
        spaced = False
    return tokens


def _join_groups(text: str) -> str:
    """Thousands separators removed, but not inside brackets, where commas separate."""
    if "," not in text:
        return text
    depth, pieces, last = 0, [], 0
    groups = {match.start(): match.end() for match in _GROUPED.finditer(text)}
    for position, character in enumerate(text):
        if position in groups and depth <= 0:
            pieces += [text[last:position], text[position : groups[position]].replace(",", "")]
            last = groups[position]
        depth += (character in "([") - (character in ")]")
        if character in "{}" and position and text[position - 1] == "\\":
            depth += 1 if character == "{" else -1
    return "".join(pieces) + text[last:]


def number(value: Fraction | int) -> Tree:
    """The tree of a rational number."""
    return ("num", str(value))


def negative(tree: Tree) -> Tree:
    """The tree of -a."""
    if tree[0] == "num":
        return number(-Fraction(tree[1]))
    return ("*", ("num", "-1"), tree)


def _times(product: Tree, factor: Tree) -> Tree:
    if product[0] == "*":
        return (*product, factor)
    return ("*", product, factor)


def free_symbols(tree: Tree) -> set[str]:
    """Names of the variables in a tree."""
    if tree[0] == "sym":
        return {tree[1]}
    return set().union(*(free_symbols(part) for part in tree[1:] if isinstance(part, tuple)))


class _Parser:
    """Recursive descent over one list of tokens. `sign` is what `\\pm` stands for: 1 or -1."""

    def __init__(self, tokens: Sequence[Token], sign: int) -> None:
        self.tokens, self.sign, self.at, self.depth = tokens, sign, 0, 0
        self.bars = 0

    def peek(self, offset: int = 0) -> tuple[str, str]:
        place = self.at + offset
        if place < len(self.tokens):
            return self.tokens[place][:2]
        return ("end", "")

    def take(self) -> Token:
        if self.at >= len(self.tokens):
            raise Unreadable("ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, kind: str, value: str) -> bool:
        if self.peek() == (kind, value):
            self.at += 1
            return True
        return False

    def expect(self, value: str) -> None:
        if not self.accept("op", value):
            raise Unreadable(f"no {value}")

    def sum(self) -> Tree:
        terms = [self.term() if self.sign_here() is None else self.signed()]
        while self.sign_here() is not None:
            terms.append(self.signed())
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def sign_here(self) -> int | None:
        kind = self.peek()
        if kind == ("cmd", "pm"):
            return self.sign
        if kind == ("cmd", "mp"):
            return -self.sign
        return _SIGNS.get(kind)

    def signed(self) -> Tree:
        sign = self.sign_here()
        self.at += 1
        if self.sign_here() is not None:
            raise Unreadable("two signs")
        term = self.term()
        return negative(term) if sign == -1 else term

    def term(self) -> Tree:
        product = self.power()
        while True:
            kind = self.peek()
            if kind in (("op", "*"), ("cmd", "cdot"), ("cmd", "times"), ("cmd", "ast")):
                self.at += 1
                product = _times(product, self.factor())
            elif kind in (("op", "/"), ("cmd", "div")):
                self.at += 1
                product = ("/", product, self.factor())
            elif self.starts_factor():
                before = self.tokens[self.at - 1]
                if kind[0] == "num" and before.kind == "num":
                    raise Unreadable("two numbers side by side")
                if kind[0] == "num" and before[:2] != ("op", ")"):
                    raise Unreadable("a number behind a factor")
                product = _times(product, self.power())
            else:
                return product

    def factor(self) -> Tree:
        """A factor behind an operator, which may have a sign of its own."""
        if self.peek() == ("op", "-"):
            self.at += 1
            return negative(self.power())
        return self.power()

    def starts_factor(self) -> bool:
        kind, value = self.peek()
        if kind == "cmd":
            return value not in _ENDS_FACTOR
        if (kind, value) == ("op", "|"):
            return self.bars == 0
        return kind in ("num", "word") or (kind == "op" and value in ("(", "{"))

    def power(self) -> Tree:
        base = self.atom()
        while True:
            if self.accept("op", "!"):
                if self.peek() == ("op", "!"):
                    raise Unreadable("a double factorial")
                base = ("!", base)
            elif self.peek() in (("op", "^"), ("op", "**")):
                base = self.raised(base)
            else:
                return base

    def raised(self, base: Tree) -> Tree:
        power = self.exponent()
        if power == "degree":
            return ("*", base, ("/", ("pi",), ("num", "180")))
        if self.peek() in (("op", "^"), ("op", "**")):
            raise Unreadable("a tower without braces")
        return ("^", base, power)

    def exponent(self) -> Any:
        """The exponent behind `^`: a group, a letter or a number; "degree" for a degree sign."""
        python = self.take().value == "**"
        if self.accept("cmd", "circ"):
            return "degree"
        if self.peek() == ("op", "{") and self.peek(1) == ("cmd", "circ"):
            self.at += 2
            self.expect("}")
            return "degree"
        if self.peek() == ("op", "-"):
            self.at += 1
            return negative(self.atom())
        kind, value = self.peek()
        if kind == "num" and len(value) > 1 and not python and self.starts_after_number():
            raise Unreadable("an exponent of several digits without braces")
        return self.atom()

    def starts_after_number(self) -> bool:
        """Whether something is multiplied to the number here, so that its end is unclear."""
        after = self.peek(1)
        return after[0] in ("word", "num") or after in (("op", "("), ("op", "{"))

    def group(self) -> Tree:
        """`{...}`, or one digit or letter, as arguments of LaTeX commands are."""
        if self.accept("op", "{"):
            inner = self.sum()
            self.expect("}")
            return inner
        kind, value = self.peek()
        if kind == "num" and len(value) == 1:
            self.at += 1
            return ("num", value)
        if kind in ("word", "cmd") and (kind == "cmd" or len(value) == 1):
            return self.atom()
        raise Unreadable("no argument")

    def digits(self) -> tuple[Tree, Tree]:
        r"""Arguments of `\frac`, of which `\frac12` and `\frac1{2}` are legal forms."""
        kind, value = self.peek()
        if kind == "num" and len(value) == 2 and value.isdigit():
            self.at += 1
            return ("num", value[0]), ("num", value[1])
        return self.group(), self.group()

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self.any_atom()
        self.depth -= 1
        return tree

    def any_atom(self) -> Tree:
        token = self.take()
        kind, value = token.kind, token.value
        if kind == "num":
            return self.numeral(value)
        if kind == "word":
            return self.word(value)
        if kind == "cmd":
            return self.command(value)
        if value in ("(", "[", "{"):
            inner = self.sum()
            self.expect(_CLOSING[value])
            return inner
        if value == "|":
            return self.absolute("|", "op")
        raise Unreadable(f"{value} is no value")

    def numeral(self, value: str) -> Tree:
        if len(value) > MAX_DIGITS:
            raise Unreadable("too many digits")
        if self.peek() == ("op", "_"):
            return self.based(value)
        if self.peek() in (("cmd", "overline"), ("cmd", "dot")) and "." in value:
            return self.repeating(value)
        if self.peek() == ("op", ".") and self.peek(1) in (("cmd", "overline"), ("cmd", "dot")):
            self.at += 1
            return self.repeating(value + ".")
        whole = Fraction(value)
        part = self.mixed_part() if value.isdigit() else None
        return number(whole if part is None else whole + part)

    def based(self, value: str) -> Tree:
        """`204_5`: a numeral in base 5, which equals itself alone; the base is part of it."""
        self.at += 1
        base = self.group()
        if base[0] != "num" or not value.isdigit():
            raise Unreadable("a numeral with an index")
        return ("sym", f"{value}_{base[1]}")

    def repeating(self, value: str) -> Tree:
        r"""`0.1\overline{6}` and `0.1\dot{6}`."""
        self.at += 1
        self.expect("{")
        period = self.take()
        self.expect("}")
        if not (period.kind == "num" and period.value.isdigit()):
            raise Unreadable("no period")
        whole, _, digits = value.partition(".")
        count, shift = len(period.value), 10 ** len(digits)
        tail = Fraction(int(period.value), (10**count - 1) * shift)
        return number(Fraction(int(whole or "0")) + Fraction(int(digits or "0"), shift) + tail)

    def mixed_part(self) -> Fraction | None:
        r"""The fraction of a mixed number: `1\frac{1}{2}`, `1 1/2`."""
        start = self.at
        if self.accept("cmd", "frac"):
            try:
                top, bottom = self.digits()
            except Unreadable:
                top = bottom = ("sym", "")
            if self.plain(top) and self.plain(bottom) and int(top[1]) < int(bottom[1]):
                return Fraction(int(top[1]), int(bottom[1]))
        elif self.peek()[0] == "num" and self.tokens[self.at].spaced:
            top_text = self.take().value
            if self.accept("op", "/") and self.peek()[0] == "num":
                bottom_text = self.take().value
                if top_text.isdigit() and bottom_text.isdigit():
                    if int(top_text) < int(bottom_text):
                        return Fraction(int(top_text), int(bottom_text))
        self.at = start
        return None

    @staticmethod
    def plain(tree: Tree) -> bool:
        return bool(tree[0] == "num" and tree[1].isdigit())

    def word(self, value: str) -> Tree:
        if value in _WORDS:
            return self.command(_WORDS[value])
        name = _SAME_FUNCTION.get(value, value)
        if name in FUNCTIONS:
            return self.function(name)
        if not value.isascii():
            raise Unreadable("a word")
        if len(value) > 1:
            rising = len(value) <= 4 and list(value) == sorted(set(value))
            if len(value) > 2 and not rising:
                raise Unreadable("a word")
            self.at -= 1
            rest = self.tokens[self.at]
            split = [rest._replace(value=letter) for letter in value]
            self.tokens = [*self.tokens[: self.at], *split, *self.tokens[self.at + 1 :]]
            self.at += 1
            value = value[0]
        return self.symbol(value)

    def symbol(self, name: str) -> Tree:
        if name in ("e", "i") and self.peek() != ("op", "_"):
            return (name,)
        while self.accept("op", "'") or self.accept("cmd", "prime"):
            name += "'"
        if self.accept("op", "_"):
            name += "_" + self.verbatim()
        if self.accept("op", "'"):
            name += "'"
        return ("sym", name)

    def verbatim(self) -> str:
        """The tokens of a group as text: indices and what stands under a bar."""
        if not self.accept("op", "{"):
            return self.take().value
        depth, words = 1, []
        while depth:
            token = self.take()
            depth += (token[:2] == ("op", "{")) - (token[:2] == ("op", "}"))
            words.append(token.value)
        return " ".join(words[:-1])

    def command(self, name: str) -> Tree:
        if name in ("pi", "infty"):
            return ("pi",) if name == "pi" else ("inf",)
        if name == "frac":
            return ("/", *self.digits())
        if name == "binom":
            return ("binom", *self.digits())
        if name in ("sqrt", "surd", "cbrt"):
            return self.root(name)
        if name in ("lvert", "vert"):
            return self.absolute(name)
        if name == "{":
            inner = self.sum()
            if not self.accept("cmd", "}"):
                raise Unreadable("a brace")
            return inner
        name = _SAME_FUNCTION.get(name, name)
        if name in FUNCTIONS:
            return self.function(name)
        if name in _SYMBOLS:
            return self.symbol("\\" + _SAME_SYMBOL.get(name, name))
        name = _SAME_DECORATION.get(name, name)
        if name in _DECORATIONS and self.peek() == ("op", "{"):
            return self.symbol(f"\\{name}({self.verbatim()})")
        if name == "begin":
            return self.matrix()
        raise Unreadable(f"\\{name}")

    def root(self, name: str) -> Tree:
        degree: Tree = ("num", "3" if name == "cbrt" else "2")
        if name == "sqrt" and self.accept("op", "["):
            degree = self.sum()
            self.expect("]")
        return ("root", degree, self.atom_without_power())

    def atom_without_power(self) -> Tree:
        kind, value = self.peek()
        if kind == "word" and len(value) > 1:
            raise Unreadable("a root of several letters without braces")
        if kind == "num":
            self.at += 1
            return number(Fraction(value))
        return self.atom()

    def absolute(self, name: str, kind: str = "cmd") -> Tree:
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        closing = "rvert" if name == "lvert" else name
        if not self.accept(kind, closing):
            raise Unreadable("no closing bar")
        return ("abs", inner)

    def function(self, name: str) -> Tree:
        base: Tree | None = None
        power: Any = None
        if self.accept("op", "_"):
            base = self.group()
        if self.peek() in (("op", "^"), ("op", "**")):
            power = self.exponent()
        if name in ("max", "min", "gcd", "lcm", "sgn") or power == "degree":
            raise Unreadable(name)
        argument = self.argument()
        if (base is not None) != (name == "log" and base is not None):
            raise Unreadable("an index of a function")
        if power == ("num", "-1"):
            if name not in _INVERSE:
                raise Unreadable("an inverse function")
            return ("fun", _INVERSE[name], argument)
        value = self.applied(name, base, argument)
        return value if power is None else ("^", value, power)

    @staticmethod
    def applied(name: str, base: Tree | None, argument: Tree) -> Tree:
        if name == "exp":
            return ("^", ("e",), argument)
        if name == "lg":
            return ("log", ("num", "10"), argument)
        if name == "log":  # without a base, any base could be meant: equal only if it is for all
            return ("log", base or ("sym", "base of log"), argument)
        return ("fun", name, argument)

    def argument(self) -> Tree:
        r"""`(x+1)`, or the product that follows: `\sin 2x`, up to the next function."""
        if self.peek() in (("op", "("), ("op", "{"), ("op", "[")):
            inner = self.atom()
            if self.peek() in (("op", "^"), ("op", "**")) and self.peek(1) != ("cmd", "circ"):
                raise Unreadable("a power of a function or of its argument")
            return self.raised(inner) if self.peek()[1] == "^" else inner
        argument = self.power()
        while self.starts_factor() and self.peek()[0] != "num":
            kind, value = self.peek()
            if (kind, value) == ("op", "(") or _SAME_FUNCTION.get(value, value) in FUNCTIONS:
                break
            argument = _times(argument, self.power())
        return argument

    def matrix(self) -> Tree:
        name = self.verbatim()
        if name == "array":
            self.verbatim()  # the alignment of its columns
        elif name not in ("pmatrix", "bmatrix", "matrix"):
            raise Unreadable("an environment")
        cells, rows = [self.sum()], 1
        width = None
        while True:
            if self.accept("op", "&"):
                cells.append(self.sum())
            elif self.accept("cmd", "\\"):
                if self.peek() == ("cmd", "end"):
                    continue
                width = width or len(cells)
                cells.append(self.sum())
                rows += 1
            elif self.accept("cmd", "end"):
                break
            else:
                raise Unreadable("a matrix without end")
        if self.verbatim() != name or len(cells) != rows * (width or len(cells)):
            raise Unreadable("a matrix with ragged rows")
        return ("matrix", len(cells) // rows, *cells)


_ENDS_FACTOR = frozenset(
    "cdot times ast div pm mp rvert vert | } end \\ le leq ge geq lt gt ne neq in notin cup cap "
    "lor land quad approx to mid".split()
)


def parse_formula(tokens: Sequence[Token], sign: int = 1) -> Tree:
    r"""The tree of all tokens.

    Args:
        sign: what `\pm` stands for, 1 or -1; `\mp` is its opposite.
    Raises:
        Unreadable: the tokens are no formula.
    """
    parser = _Parser(tokens, sign)
    tree = parser.sum()
    if parser.at != len(parser.tokens):
        raise Unreadable("goes on behind the formula")
    return tree
