r"""One spelling for what is written in many: Unicode, full-width characters, LaTeX styling.

Nothing that carries a meaning is removed: spacing, sizes, fonts and math delimiters go, words and
signs stay. Every function runs in time linear in the text and never raises.
"""

from __future__ import annotations

import re
import unicodedata

_FONTS = (
    "text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|hbox|rm|bf|"
    "bm|boldsymbol|operatorname|emph|underline"
)
_WRAPPER = re.compile(rf"\\(?:{_FONTS})\*?\s{{0,4}}\{{([^{{}}]{{0,1000}})\}}")
_SPACE = re.compile(
    r"\s+|~|(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z]{2})"
    r"|\\(?:thinspace|enspace|hfill|newline)(?![A-Za-z])"
)
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|[Bb]igg?[lrm]?|left|right|middle)"
    r"(?![A-Za-z])\.?"
)
_VARIANT = re.compile(r"\\[dtc](frac|binom)(?![A-Za-z])")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")
_FULL_STOP = re.compile(r"(?<![.。])[.。]?\s*\Z")
_DEGREE = re.compile(r"\\degree(?![A-Za-z])")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}%])")
_PULLED_GROUP = re.compile(r"(?<=\d)(?:,\s?\\!|\s?\{,\s?\})\s?(?=\d{3}(?!\d))")
_THIN_GROUP = re.compile(r"(?<=\d)\\[,;](?=\d{3}(?!\d))")
_BOLD = re.compile(r"(?<![\w)}\]])\*\*(?!\s)([^*]{1,1000})\*\*(?![\w({\[])")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_TEMPERATURE = re.compile(
    r"\^?\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm|rm)\s*\{\s*([CF])\s*\}|([CF]))(?![A-Za-z])"
)
_SHOWS_NOTHING = (
    r"\\[hv]?phantom\s?\{[^{}]{0,200}\}|\\[hv]space\*?\s?\{[^{}]{0,40}\}"
    r"|\\(?:text)?color\s?\{[^{}]{0,40}\}|\\(?:left|right)\.|\\(?:null|relax|strut)(?![A-Za-z])"
    r"|\\m?(?:kern|hskip|vskip|skip)\s?-?[\d.]{1,9}\s?[a-z]{2}|\\[()\[\]\\]"
)
_INVISIBLE = re.compile(
    "[\\s~{}$*%\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u2800\u3164\uffa0\ufe00-\ufe0f]"
    rf"|{_SHOWS_NOTHING}|\\[,;:! ]|\\(?:{_FONTS}|q?quad|thinspace|enspace|displaystyle)(?![A-Za-z])"
    r"|\\\Z"
)

_NAMES = {
    "−‐‑‒–—―﹣": "-", "×✕": "\\times ", "·⋅•∙‧": "\\cdot ", "÷": "\\div ", "∗": "*", "⁄∕": "/",
    "≤≦⩽": "\\le ", "≥≧⩾": "\\ge ", "≠": "\\ne ", "≈≒≃": "\\approx ", "∞": "\\infty ",
    "√": "\\surd ", "∛": "\\cbrt ", "°º˚": "^\\circ ", "±": "\\pm ", "∓": "\\mp ",
    "∪⋃": "\\cup ", "∩⋂": "\\cap ", "∈": "\\in ", "∅Ø": "\\emptyset ", "ℝ": "\\mathbb{R}",
    "∠": "\\angle ", "△": "\\triangle ", "∨": "\\lor ", "∧": "\\land ", "→": "\\to ",
    "‘’′": "'", "【〔": "(", "】〕": ")", "“”": '"', "、": ",",
    "：∶": ":", "℃": "\\celsius ", "℉": "\\fahrenheit ",
    "￥¥": "\\yuan ", "€": "\\euro ", "£": "\\pound ", "￠¢": "\\cent ",
    "㎝": "cm", "㎞": "km", "㎜": "mm", "㎏": "kg", "㎡": "m^2", "㎥": "m^3", "㎎": "mg",
    "㎖": "mL",
    "µ": "\\mu ", "Ω": "\\Omega ",
    "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008": " ",
    "\u2009\u200a\u202f\u205f\u3000": " ",
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi",
    "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi",
    "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Σ": "Sigma",
    "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip


def _characters() -> dict[int, str]:
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    for characters, name in _NAMES.items():
        table.update({ord(character): name for character in characters})
    table.update({ord(letter): f"\\{name} " for letter, name in _GREEK.items()})
    for character in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
        top, bottom = unicodedata.normalize("NFKC", character).split("⁄")
        table[ord(character)] = f"\\frac{{{top}}}{{{bottom}}}"
    return table


_CHARACTERS = _characters()


def _ascii(run: str) -> str:
    return unicodedata.normalize("NFKC", run).replace("−", "-")


def visible(text: str) -> str:
    """Text without characters that show nothing: zero-width, control and direction marks."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cf", "Cc"))


def is_blank(text: str) -> bool:
    r"""True if nothing of `text` would be seen: `\text{ }`, `\,`, `{}`, zero-width characters."""
    return not _INVISIBLE.sub("", visible(text))


def unwrap_text(text: str) -> str:
    r"""Text with `\text{...}` and its like, up to four deep, replaced by what they hold."""
    for _ in range(4):
        unwrapped = _WRAPPER.sub(lambda wrapper: wrapper[1] or " ", text)
        if unwrapped == text:
            break
        text = unwrapped
    return text


def _money(text: str) -> str:
    r"""Dollar signs that enclose formulas removed, others as `\dollar`."""
    text = text.replace("\\$", "\\dollar ")
    if text.count("$") == 1 and (text[0] == "$" or text[-1] == "$") and len(text) > 1:
        return text.replace("$", "\\dollar ")
    return text.replace("$", " ")


def tidy(text: str) -> str:
    r"""The text in one notation: LaTeX commands for signs, ASCII brackets and letters, one space.

    `２½％` becomes `2\frac{1}{2}%`. Fonts (`\text{}`) stay, for they tell words from letters.
    """
    text = visible(text)
    if not text.isascii():
        text = _RAISED.sub(lambda run: f"^{{{_ascii(run[0])}}}", text)
        text = _LOWERED.sub(lambda run: f"_{{{_ascii(run[0])}}}", text)
        text = text.translate(_CHARACTERS)
    if "$" in text:
        text = _money(_DELIMITER.sub(" ", text).strip())
    if "," in text:
        text = _PULLED_GROUP.sub("{,}", text)
    if "**" in text:
        text = _BOLD.sub(r"\1", text)
    if "\\" in text:
        if "\\begin" not in text:  # where there are no rows, a doubled backslash is an escape
            text = _DOUBLED.sub("\\\\", text)
        text = _THIN_GROUP.sub("{,}", _DEGREE.sub(r"^\\circ ", text))
        text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
        text = _STYLE.sub(" ", _DELIMITER.sub(" ", text))
        text = _VARIANT.sub(r"\\\1", text.replace("\\%", "%"))
        text = _TEMPERATURE.sub(
            lambda m: "\\celsius " if "C" in (m[1], m[2]) else "\\fahrenheit ", text
        )
    return _SPACE.sub(" ", text.replace("{,}", "\u2063")).replace("\u2063", "{,}").strip()


def without_full_stop(text: str) -> str:
    """Text without one full stop at its end; dots that go on stay, for they leave something out."""
    return _FULL_STOP.sub("", text)


def same_key(text: str) -> str:
    """Answers with equal keys are the same text but for spacing, fonts and a final full stop."""
    key = without_full_stop(unwrap_text(tidy(text)).replace("{,}", ""))
    return re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", key).strip()
