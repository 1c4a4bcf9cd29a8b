"""The tokenizer and its chat template: what the model reads is exactly what was meant."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.data.special_tokens import IMAGE_CONTEXT, SPECIAL_TOKENS, TURN_END
from r1v3.data.tokenizer import SYSTEM_PROMPT, load_tokenizer, render_prompt, train_tokenizer
from tests import tiny

USER = [{"role": "user", "content": "How many?"}]


def encode(text: str) -> list[int]:
    return list(tiny.tokenizer().encode(text, add_special_tokens=False))


def shown(messages: list[dict[str, str]], images: list[int], thinking: bool = True) -> str:
    return str(
        tiny.tokenizer().decode(
            render_prompt(tiny.tokenizer(), messages, images, thinking=thinking)
        )
    )


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    """Up to Unicode's canonical composition, which Qwen2's tokenizer applies as well."""
    assert tiny.tokenizer().decode(encode(text)) == unicodedata.normalize("NFC", text)


@settings(max_examples=50, deadline=None)
@given(st.text("0123456789+-=., \n", max_size=40))
def test_every_digit_is_a_token_of_its_own(text: str) -> None:
    """Merged digits would hide the columns that sums are worked out in."""
    tokens = [tiny.tokenizer().decode([i]) for i in encode(text)]
    assert all(token.isdigit() is False or len(token) == 1 for token in tokens)
    assert sum(token.isdigit() for token in tokens) == sum(c.isdigit() for c in text)
    assert not any(any(map(str.isdigit, t)) and len(t) > 1 for t in tokens)


def test_digits_stay_single_even_if_one_number_is_all_there_is_to_learn_from() -> None:
    greedy = train_tokenizer(["123 123 123"] * 50, 400)
    assert len(greedy.encode("123", add_special_tokens=False)) == 3


def test_think_tags_are_ordinary_text_of_several_tokens() -> None:
    special = set(tiny.tokenizer().all_special_ids)
    for tag in ("<think>", "</think>"):
        ids = encode(tag)
        assert len(ids) > 1 and not special & set(ids)


def test_special_tokens_are_single_ids_and_take_the_first_places() -> None:
    for place, token in enumerate(SPECIAL_TOKENS):
        assert encode(token) == [place]
    assert tiny.tokenizer().eos_token == TURN_END
    assert tiny.tokenizer().pad_token_id not in (tiny.tokenizer().eos_token_id, None)


def test_the_vocabulary_keeps_to_its_size_and_can_write_every_byte() -> None:
    small = train_tokenizer(tiny.TEXTS, 290)
    assert len(small) <= 290
    text = "".join(map(chr, range(1, 256))) + "漢😀"
    assert small.decode(small.encode(text, add_special_tokens=False)) == text


def test_slow_thinking_opens_a_thought() -> None:
    assert shown(USER, []) == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_nothink_is_the_same_prompt_without_the_tag() -> None:
    slow, fast = shown(USER, []), shown(USER, [], thinking=False)
    assert slow == fast + "<think>\n"


def test_a_given_system_message_replaces_the_default() -> None:
    text = shown([{"role": "system", "content": "Be brief."}, *USER], [])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.count("system") == 1


def test_earlier_turns_are_shown_in_order() -> None:
    turns = [*USER, {"role": "assistant", "content": "3"}, {"role": "user", "content": "Why?"}]
    assert "<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\nWhy?" in shown(turns, [])


def test_each_placeholder_becomes_as_many_context_tokens_as_its_picture_takes() -> None:
    messages = [{"role": "user", "content": "<image>a<image>b"}]
    text = shown(messages, [2, 3])
    assert f"<img>{IMAGE_CONTEXT * 2}</img>a<img>{IMAGE_CONTEXT * 3}</img>b<|im_end|>" in text
    ids = render_prompt(tiny.tokenizer(), messages, [2, 3])
    assert ids.count(tiny.tokenizer().convert_tokens_to_ids(IMAGE_CONTEXT)) == 5


@pytest.mark.parametrize("images", [[], [1, 1]])
def test_pictures_and_placeholders_must_be_as_many(images: list[int]) -> None:
    with pytest.raises(ValueError, match=f"1 <image> placeholders for {len(images)} images"):
        render_prompt(tiny.tokenizer(), [{"role": "user", "content": "<image>?"}], images)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_in_a_message_is_refused(token: str) -> None:
    """It would end the turn, or stand for a picture that is not there."""
    for role in ("system", "user"):
        messages = [{"role": role, "content": f"a{token}b"}, *USER]
        with pytest.raises(ValueError) as caught:
            render_prompt(tiny.tokenizer(), messages, [])
        assert token in str(caught.value) and role in str(caught.value)


def test_think_tags_in_a_message_are_allowed() -> None:
    """They are text to this tokenizer, and a person may ask about them."""
    assert "what is </think>?" in shown([{"role": "user", "content": "what is </think>?"}], [])


def test_a_saved_tokenizer_loads_and_renders_the_same(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "<image>\nHow many? 34+58"}]
    for thinking in (True, False):
        first, second = (
            render_prompt(t, messages, [4], thinking=thinking) for t in (tiny.tokenizer(), loaded)
        )
        assert first == second
    assert loaded.decode(loaded.encode("a . b 's", add_special_tokens=False)) == "a . b 's"
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json"):
        load_tokenizer(tmp_path)
