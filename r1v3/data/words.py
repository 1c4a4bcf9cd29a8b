"""Which tokens of a vocabulary are a given word.

NoWait decoding bans reflection words and the critical-token monitor watches them; both need
every token that writes the word, and a vocabulary has many: "Wait", " wait", "\\twait", "WAIT",
"Wait,", ".wait". They are found by reading the vocabulary, not by guessing forms to encode.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any

# How byte-level and sentencepiece vocabularies write leading blanks, for a tokenizer that has
# no decoder to undo it.
_MARKERS = str.maketrans({"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r", "▁": " "})


def expand_words(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """Every token that alone writes one of `words`, whatever its case and surroundings.

    A token counts when its text, without the blanks and punctuation around it and without regard
    to case, is the word. Longer words that contain it ("waiting", "await") do not count, nor do
    special tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer` or a fast tokenizer of transformers.
        words: such as ["Wait", "Alternatively", "Hmm"].
    Returns:
        Token ids, sorted, each once.
    Raises:
        ValueError: `words` is empty or a single string, a word is blank, no token writes a word
            alone (names the word), or the tokenizer is of another kind.
    """
    if isinstance(words, str):
        raise ValueError(f"words must be a list of words, got the string {words!r}")
    written = {_core(word): word for word in words}
    if not written or "" in written:
        raise ValueError(f"words must be one or more words, got {list(written.values())}")
    found: dict[str, list[int]] = {core: [] for core in written}
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "get_added_tokens_decoder"):
        raise ValueError(
            "tokenizer must be a tokenizers.Tokenizer or a fast tokenizer of transformers, got "
            f"{type(tokenizer).__name__}"
        )
    special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    special.update(getattr(tokenizer, "all_special_ids", ()))
    entries = [(id, raw) for raw, id in backend.get_vocab().items() if id not in special]
    texts = backend.decode_batch([[id] for id, _ in entries], skip_special_tokens=False)
    for (id, raw), text in zip(entries, texts, strict=True):
        for core in {_core(text), _core(raw.translate(_MARKERS))}:
            if core in found:
                found[core].append(id)
    for core, ids in found.items():
        if not ids:
            word = written[core]
            pieces = backend.encode(word, add_special_tokens=False).tokens
            raise ValueError(
                f"the word {word!r} is not a single token in any form in this vocabulary of "
                f"{len(entries)} tokens; it is split into {pieces}"
            )
    return sorted({id for ids in found.values() for id in ids})


def _core(text: str) -> str:
    start, end = 0, len(text)
    while start < end and _is_margin(text[start]):
        start += 1
    while end > start and _is_margin(text[end - 1]):
        end -= 1
    return text[start:end].casefold()


def _is_margin(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")
