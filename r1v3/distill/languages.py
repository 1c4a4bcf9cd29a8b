"""Languages of a thought, told by py3langid (langid.py; offline, 4.6 MB, BSD)."""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from r1v3.distill.text import HAN, prose, sentences

# Runs of one script; digits, spaces and marks belong to the run that they stand in.
_RUN = re.compile(
    rf"[{HAN}\u3040-\u30ff](?:[^A-Za-z\u00c0-\u024f\u0370-\u05ff\uac00-\ud7af]*"
    rf"[{HAN}\u3040-\u30ff])?"
    rf"|[^\W\d_{HAN}\u3040-\u30ff](?:[^{HAN}\u3040-\u30ff]*[^\W\d_{HAN}\u3040-\u30ff])?"
)
_CHINESE = re.compile(f"[{HAN}]")
_KANA = re.compile("[\u3040-\u30ff]")
_OTHER_LETTER = re.compile(rf"[^\W\d_{HAN}\u3040-\u30ff]")
_WORD = re.compile(r"[^\W\d_]{2,}")
# Fewer words of an alphabet are names, units and variables.
_LEAST_WORDS = 4
_LEAST_CHINESE = 2
# A Chinese character weighs as much as so many letters.
_CHINESE_WEIGHT = 3
_SURE = 0.9


def languages(text: str, expected: Sequence[str]) -> Counter[str]:
    """Letters of a text by language, formulas and quotations left out.

    A run of an alphabet counts as a language that is not expected only where its identification is
    sure; else it counts as the likeliest expected one.
    """
    found: Counter[str] = Counter()
    for sentence in sentences(prose(text)):
        for run in _RUN.findall(sentence):
            chinese = len(_CHINESE.findall(run))
            if chinese or _KANA.search(run):
                if chinese >= _LEAST_CHINESE or _KANA.search(run):
                    language = "ja" if _KANA.search(run) else "zh"
                    found[language] += _CHINESE_WEIGHT * max(chinese, len(run) // 2)
            elif len(_WORD.findall(run)) >= _LEAST_WORDS:
                found[_identify(run, tuple(expected))] += len(_OTHER_LETTER.findall(run))
    return found


def is_mixed(text: str, expected: Sequence[str], most_other: float) -> bool:
    """Return whether a text is in more than one language, or its main one is not expected."""
    found = languages(text, expected)
    if not found:
        return False
    main, letters = found.most_common(1)[0]
    return main not in expected or 1 - letters / found.total() > most_other


def require_identifier() -> None:
    """Load the identifier; raises ImportError as `is_mixed` where it is not installed."""
    _identifier()


def _identify(run: str, expected: tuple[str, ...]) -> str:
    best, sure = _identifier().classify(run)
    if best in expected or sure >= _SURE:
        return str(best)
    return next((str(language) for language, _ in _identifier().rank(run) if language in expected))


@functools.cache
def _identifier() -> Any:
    """The identifier.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError(
            "the filter `mixed languages` needs py3langid: pip install 'r1v3[distill]', or name "
            "the filter in `filters.off`"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
