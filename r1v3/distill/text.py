"""Words and sentences of English, Chinese and mixed text."""

import re

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# A Chinese character is a word; so are runs of letters and digits of other scripts.
_WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+(?:['’][^\W\d_{HAN}]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])|\n+")
# Formulas, code and numbers are in no language.
_NOT_PROSE = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|```.*?```|`[^`\n]*`|\\[A-Za-z]+(?:\{[^{}]*\})?"
    r"|https?://\S+",
    re.DOTALL,
)
# What is quoted stands in the picture or in the question.
_QUOTED = re.compile(
    r"“[^”]{0,200}”|\"[^\"\n]{0,200}\"|「[^」]{0,200}」|『[^』]{0,200}』|《[^》]{0,80}》"
)


def words(text: str) -> list[str]:
    """The words of a text in small letters; a Chinese character is one."""
    return _WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that hold something."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def prose(text: str) -> str:
    """A text without formulas, code, addresses and quotations."""
    return _QUOTED.sub(" ", _NOT_PROSE.sub(" ", text))
