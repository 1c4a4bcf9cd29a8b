"""From sampled tokens to the text that a client sees, piece by piece.

Pieces are final: a character is held back until its last byte is there, the beginning of a tag or
of a stop string until it is clear what it is. The pieces of a stream therefore join to the text of
an answer that is not streamed.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from r1v3.data.thoughts import THINK_CLOSE, THINK_OPEN


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Return the bytes that every token id writes.

    Raises:
        ValueError: the tokenizer is not a byte-level one, as Qwen2's is.
    """
    decoder = str(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" not in decoder:
        raise ValueError(f"the tokenizer's decoder is {decoder:.60}; only byte-level ones are read")
    # Byte-level vocabularies write every byte as a character of GPT-2's alphabet.
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    found = []
    for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        if token is None:  # a hole in the vocabulary
            found.append(b"")
        elif all(character in alphabet for character in token):
            found.append(bytes(alphabet[character] for character in token))
        else:  # an added token, which stands as it is
            found.append(token.encode("utf-8", "replace"))
    return found


def held_back(text: str, sought: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that may begin one of `sought`."""
    longest = max((len(one) for one in sought), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in sought if len(one) > length):
            return length
    return 0


@dataclass
class Piece:
    """Further text of a thought and of an answer."""

    thought: str = ""
    answer: str = ""


class ThoughtSplitter:
    """Separates thoughts from the answer, without their tags and the blanks beside the closing one.

    Args:
        thinking: whether the prompt has opened a thought.
    """

    def __init__(self, thinking: bool) -> None:
        self.thinking = self._after_thought = thinking
        self._rest = ""
        self._blanks = ""  # at the end of the thoughts so far
        self._thought = False

    def read(self, text: str, *, last: bool = False) -> Piece:
        """Take further text; `last` releases what is held back."""
        piece = Piece()
        self._rest += text
        while True:
            tag = THINK_CLOSE if self.thinking else THINK_OPEN
            before, found, after = self._rest.partition(tag)
            if not found:
                break
            self._put(piece, before)
            self.thinking, self._rest = not self.thinking, after
            self._blanks = "\n" if self.thinking and self._thought else ""
            self._after_thought = True
        keep = 0 if last else held_back(self._rest, [tag])
        self._put(piece, self._rest[: len(self._rest) - keep])
        self._rest = self._rest[len(self._rest) - keep :]
        return piece

    def _put(self, piece: Piece, text: str) -> None:
        if self.thinking:
            text = self._blanks + text
            kept = text.rstrip()
            self._blanks = text[len(kept) :]
            self._thought = self._thought or bool(kept)
            piece.thought += kept
            return
        if self._after_thought:
            text = text.lstrip()
            self._after_thought = not text
        piece.answer += text


class StopSearch:
    """Looks for stop strings in text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._rest = ""
        self.found = False

    def read(self, text: str, *, last: bool = False) -> str:
        """Return the text that is certain, up to the first stop string; nothing follows one."""
        if not self._stops or self.found:
            return "" if self.found else text
        self._rest += text
        places = [self._rest.find(stop) for stop in self._stops]
        if any(place >= 0 for place in places):
            self.found = True
            return self._rest[: min(place for place in places if place >= 0)]
        keep = 0 if last else held_back(self._rest, self._stops)
        text, self._rest = (
            self._rest[: len(self._rest) - keep],
            self._rest[len(self._rest) - keep :],
        )
        return text


class Writer:
    """The text of one completion, for a client.

    Args:
        vocabulary: bytes of every token id.
        thinking: whether the prompt has opened a thought.
        stops: strings that end the answer, and are not part of it; thoughts may hold them.
        unfinished: the answer of a completion that ends within its thought.
    """

    def __init__(
        self, vocabulary: Sequence[bytes], thinking: bool, stops: Sequence[str], unfinished: str
    ) -> None:
        self._vocabulary, self._unfinished = vocabulary, unfinished
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._splitter, self._search = ThoughtSplitter(thinking), StopSearch(stops)
        self._answered = False

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return self._splitter.thinking

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._search.found

    def read(self, token: int) -> Piece:
        """Return the text that a further token makes certain."""
        return self._piece(self._characters.decode(self._vocabulary[token]))

    def end(self) -> Piece:
        """Return the rest of the text."""
        piece = self._piece(self._characters.decode(b"", final=True), last=True)
        if self.thinking and not self._answered:
            piece.answer += self._unfinished
        return piece

    def _piece(self, text: str, *, last: bool = False) -> Piece:
        piece = self._splitter.read(text, last=last)
        piece.answer = self._search.read(piece.answer, last=last)
        self._answered = self._answered or bool(piece.answer)
        return piece
