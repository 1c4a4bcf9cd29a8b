"""Text in pieces: what streams is what is answered at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.data.tokenizer import load_tokenizer
from r1v3.serve.text import StopSearch, ThoughtSplitter, Writer, token_bytes
from tests import tiny
from tests.serve.serving import MODEL, Served, user

WORDS = tiny.tokenizer()
VOCABULARY = token_bytes(WORDS)
TEXTS = st.text(st.sampled_from("ab \n<>/thinké漢🙂"), max_size=30)


def written(text: str, *, thinking: bool = True, stops: tuple[str, ...] = ()) -> tuple[str, str]:
    """Thought and answer of a completion's text, token by token."""
    writer = Writer(VOCABULARY, thinking, stops, "(unfinished)")
    thought = answer = ""
    for token in WORDS.encode(text, add_special_tokens=False):
        piece = writer.read(token)
        thought, answer = thought + piece.thought, answer + piece.answer
        assert "\ufffd" not in piece.thought + piece.answer
        if writer.stopped:
            return thought, answer
    piece = writer.end()
    return thought + piece.thought, answer + piece.answer


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("I see 4.\n</think>\n\nIt is 4.", "I see 4.", "It is 4."),
        ("I see 4.</think>It is 4. ", "I see 4.", "It is 4. "),
        ("I see 4.", "I see 4.", "(unfinished)"),
        ("", "", "(unfinished)"),
        ("</think>", "", ""),
        ("1</think>2<think>3</think>4", "1\n3", "24"),
        ("1</think>2<think>3", "1\n3", "2"),
        ("1</think>2</think>3", "1", "2</think>3"),
        ("a <thi </thin b", "a <thi </thin b", "(unfinished)"),
        ("1</think>x <think", "1", "x <think"),
        ("漢字 🙂</think>é🙂", "漢字 🙂", "é🙂"),
    ],
)
def test_thought_and_answer(text: str, thought: str, answer: str) -> None:
    """Fails if a tag shows, an answer is taken for a thought, or a character is lost."""
    assert written(text) == (thought, answer)


def test_without_a_thought_the_text_is_the_answer() -> None:
    """Fails if NoThink loses blanks, or an opened thought stays in the answer."""
    assert written(" 4\n", thinking=False) == ("", " 4\n")
    assert written("4 <think>x</think> 5", thinking=False) == ("x", "4 5")


@pytest.mark.parametrize(
    ("text", "stops", "answer"),
    [
        ("t.\n\nt</think>\n\nA\n\nB", ("\n\n",), "A"),
        ("</think>one two", ("two",), "one "),
        ("</think>one tw", ("two",), "one tw"),
        ("</think>aab", ("ab", "b"), "a"),
        ("</think>é🙂漢", ("🙂",), "é"),
    ],
)
def test_stop_strings_end_the_answer(text: str, stops: tuple[str, ...], answer: str) -> None:
    """Fails if a stop string is shown, ends a thought, or holds back text for good."""
    assert written(text, stops=stops)[1] == answer


@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_do_not_depend_on_where_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Fails if a tag or a stop string over two tokens is missed, or its beginning is let out."""

    def read(cuts: list[int]) -> tuple[str, str]:
        splitter, search, thought, answer = ThoughtSplitter(True), StopSearch(stops), "", ""
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = splitter.read(text[start:stop], last=stop == len(text))
            thought += piece.thought
            answer += search.read(piece.answer, last=stop == len(text))
        return thought, answer

    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) - {len(text)})
    assert read(cuts)[1] == read([])[1]
    if "<think>" not in text.partition("</think>")[2]:
        assert read(cuts) == read([])


@pytest.mark.parametrize("words", [WORDS, load_tokenizer(MODEL)], ids=["tiny", "demo"])
def test_bytes_are_those_of_the_tokenizer(words: tiny.PreTrainedTokenizerFast) -> None:
    """Fails if a token is decoded otherwise than by the tokenizer, broken characters included."""
    vocabulary = token_bytes(words)
    generator = tiny.torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = tiny.torch.randint(0, len(words), (12,), generator=generator).tolist()
        text = b"".join(vocabulary[i] for i in ids).decode("utf-8", "replace")
        assert text == words.decode(ids, skip_special_tokens=False)


def test_a_sentencepiece_tokenizer_is_refused() -> None:
    """Fails if a tokenizer of another kind is served with garbled text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    other = Tokenizer(models.BPE())
    other.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="byte-level"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=other))


@pytest.mark.parametrize("mode", ["slow", "nothink", "budget-7"])
def test_a_stream_joins_to_the_answer(served: Served, mode: str) -> None:
    """Fails if what streams is not what is answered at once: text, tokens, finish or usage."""
    settings = {
        "mode": mode, "temperature": 1.5, "seed": 4, "n": 3, "max_tokens": 48, "logprobs": True,
        "return_token_ids": True, "stop": ["5"], "messages": [user("é 漢 🙂?")],
    }  # fmt: skip
    whole = served.chat(**settings)
    chunks = served.events(stream_options={"include_usage": True}, **settings)
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c for one in chunks for c in one["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        for key in ("content", "reasoning_content"):
            joined = "".join(part["delta"].get(key, "") for part in parts)
            assert joined == (choice["message"][key] or "")
        ids = [i for part in parts for i in part.get("token_ids", [])]
        assert ids == choice["token_ids"]
        entries = [e for p in parts if p.get("logprobs") for e in p["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        finishes = [part["finish_reason"] for part in parts]
        assert finishes == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_characters_of_several_tokens_arrive_whole(served: Served) -> None:
    """Fails if a stream shows half a character: the demo's vocabulary writes these byte by byte."""
    words = load_tokenizer(MODEL)
    text = "漢🙂"
    ids = words.encode(text, add_special_tokens=False)
    assert len(ids) == 7
    vocabulary = token_bytes(words)
    writer = Writer(vocabulary, False, (), "")
    pieces = [writer.read(token).answer for token in ids]
    assert pieces == ["", "", "漢", "", "", "", "🙂"]
