"""Tokenizers of other people's model folders: their chat templates, and files without
tokenizer.json."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from r1v3.data.encoding import encode_sample
from r1v3.data.sample import make_sample
from r1v3.data.special_tokens import SPECIAL_TOKENS, TURN_END
from r1v3.data.tiles import ImageShape
from r1v3.data.tokenizer import CHAT_TEMPLATE, load_tokenizer, render_prompt, train_tokenizer
from tests import tiny

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
TURNS += "{{ '<|im_end|>\n' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# name -> a template; whether it opens a thought by itself when asked to think, and when not to.
TEMPLATES = {
    "plain": TURNS + OPEN,
    "plain with a last line break": TURNS + OPEN + "\n",
    "in one loop": "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}",
    "with a system turn": "<|im_start|>system\nYou see.<|im_end|>\n" + TURNS + OPEN,
    "with a macro": "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}" + OPEN,
    "generation prompt always": TURNS + "{{ '<|im_start|>assistant\n' }}",
    "another variable": TURNS + OPEN + "{% if thinking %}<think>\n{% endif %}",
    "always open": TURNS + OPEN.replace("assistant\n", "assistant\n<think>\n"),
    "always open, no line break": TURNS + OPEN.replace("assistant\n", "assistant\n<think>"),
    "always open, macro": "{% macro t(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endmacro %}{% for m in messages %}{{ t(m) }}{% endfor %}<|im_start|>assistant\n<think>\n",
    "closed thought for NoThink": TURNS
    + OPEN
    + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "heeds it": TURNS + OPEN + "{% if enable_thinking is not defined or enable_thinking %}"
    "{{ '<think>\n' }}{% endif %}",
    "the wrong way round": TURNS
    + OPEN
    + "{% if not enable_thinking %}{{ '<think>\n' }}{% endif %}",
    "none at all": None,
}
USER = [{"role": "user", "content": "How many?"}]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        eos_token=TURN_END,
        pad_token="<|endoftext|>",
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_opens_a_thought_for_slow_thinking_only(name: str, tmp_path: Path) -> None:
    """Fails if slow and NoThink prompts are the same, so that neither mode is what it is called."""
    words = with_template(TEMPLATES[name])
    words.save_pretrained(str(tmp_path))
    for tokenizer in (words, load_tokenizer(tmp_path)):
        slow, fast = (
            str(tokenizer.decode(render_prompt(tokenizer, USER, [], thinking=thinking)))
            for thinking in (True, False)
        )
        assert slow.rstrip("\n").endswith("<|im_start|>assistant\n<think>"), slow
        assert slow.count("<think>") == 1
        assert not fast.rstrip().endswith("<think>"), fast
        assert fast.count("<think>") == fast.count("</think>")
        assert "<|im_start|>user\nHow many?<|im_end|>\n" in slow
        assert slow.startswith(fast.partition("<think>")[0].rstrip("\n"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_loaded_template_works_without_us(name: str, tmp_path: Path) -> None:
    """Fails if a checkpoint served by another program is asked with another prompt than the one it
    was trained with, or a conversation that goes on gets a tag."""
    with_template(TEMPLATES[name]).save_pretrained(str(tmp_path / "a"))
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save_pretrained(str(tmp_path / "b"))
    again = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "b"))
    for thinking in (True, False):
        text = again.apply_chat_template(
            USER, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        ids = again.encode(text, add_special_tokens=False)
        assert ids == render_prompt(loaded, USER, [], thinking=thinking)
    if name in ("plain", "in one loop", "with a system turn", "always open", "none at all"):
        ended = again.apply_chat_template(USER, tokenize=False, add_generation_prompt=False)
        assert str(ended).rstrip().endswith("How many?<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["<image>", "<image>a<image>\n b", "x <image><image><image>"])
def test_pictures_have_the_tokens_of_the_text_written_out(
    name: str, content: str, tmp_path: Path
) -> None:
    """Fails if a server that tokenizes every image token sees another prompt than the trainer."""
    with_template(TEMPLATES[name]).save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    counts = [2, 300, 1][: content.count("<image>")]
    text = str(
        loaded.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
    )
    for count in counts:
        text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * count + "</img>", 1)
    ids = render_prompt(loaded, [{"role": "user", "content": content}], counts)
    assert ids == loaded.encode(text, add_special_tokens=False)


def test_a_template_that_writes_image_tokens_itself_is_refused() -> None:
    """Fails if a prompt of more image tokens than its pictures have features goes on."""
    tokenizer = with_template(TURNS + "<IMG_CONTEXT>" + OPEN)
    with pytest.raises(ValueError, match="2 <IMG_CONTEXT> tokens for 1 images; the chat template"):
        render_prompt(tokenizer, [{"role": "user", "content": "<image>?"}], [3])


@pytest.mark.parametrize("name", TEMPLATES)
def test_sft_trains_the_opening_tag_once(name: str) -> None:
    """Fails if the tag stands neither in the prompt nor in the response, or in both."""
    tokenizer, shape = with_template(TEMPLATES[name]), ImageShape(32, 1, 4)
    for opened in ("<think>\nIt is 3.\n</think>\n\n\\boxed{3}", "It is 3.\n</think>\n\n\\boxed{3}"):
        sample = make_sample(
            question="How many?", ground_truth="3", data_source="x", index=0, response=opened
        )
        example = encode_sample(sample, tokenizer, shape)
        text = str(tokenizer.decode([*example.prompt_ids, *example.response_ids]))
        assert text.count("<think>") == 1
        assert "assistant\n<think>" in text and text.endswith(f"\\boxed{{3}}{TURN_END}")


TEXTS = (
    "The quick brown fox can't jump; it's 1,234.5 km away!",
    "ÄÖÜ straße, naïve café, Zürich",
    "Привет, мир! Ответ: 42",
    "中文字符，答案是选B。",
    "日本語のテキストとカタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया",
    "e\u0301 combining, ﬁ ligature, \u200bzero width",
    "😀👩‍👩‍👧 emoji \U0001f9ea",
    "  two  spaces\n\n\ttabs\r\nand lines \n",
    "def f(x):\n    return x**2  # √2 ≤ π",
    "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>?<|im_end|>",
    "<tool_call> a<tool_call>b <box>1</box>",
    "",
)


@cache
def fast(specials_first: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens are the first of its vocabulary, or added behind it."""
    if specials_first:
        made = train_tokenizer(TEXTS[:6] * 4, 420)
    else:
        learned = train_tokenizer(TEXTS[:6] * 4, 420).backend_tokenizer
        model = json.loads(learned.to_str())
        kept = [t for t in model["model"]["vocab"] if t not in SPECIAL_TOKENS]
        model["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
        model["added_tokens"] = []
        bare = type(learned).from_str(json.dumps(model))
        bare.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
        made = PreTrainedTokenizerFast(
            tokenizer_object=bare, eos_token=TURN_END, pad_token="<|endoftext|>"
        )
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made


def write_vocabulary(folder: Path, made: PreTrainedTokenizerFast, where: Sequence[str]) -> None:
    """vocab.json and merges.txt, the added tokens in one file or the other, or in both."""
    stored = json.loads(made.backend_tokenizer.to_str())
    folder.mkdir()
    vocabulary = json.dumps(stored["model"]["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": TURN_END}
    config |= {"pad_token": "<|endoftext|>", "additional_special_tokens": list(SPECIAL_TOKENS[1:])}
    if "tokenizer_config.json" in where:
        config["added_tokens_decoder"] = {
            str(t["id"]): {key: t[key] for key in t if key != "id"} for t in stored["added_tokens"]
        }
    if "added_tokens.json" in where:
        added = {t["content"]: t["id"] for t in stored["added_tokens"]}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("specials_first", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        ["tokenizer_config.json"],
        ["added_tokens.json"],
        ["tokenizer_config.json", "added_tokens.json"],
    ],
    ids="+".join,
)
def test_a_vocabulary_with_merges_gives_the_same_ids(
    tmp_path: Path, where: list[str], specials_first: bool
) -> None:
    """Fails if a folder without tokenizer.json cannot be trained, or is trained on other ids."""
    made = fast(specials_first)
    write_vocabulary(tmp_path / "slow", made, where)
    loaded = load_tokenizer(tmp_path / "slow")
    for text in TEXTS:
        wanted = made.encode(text, add_special_tokens=False)
        assert loaded.encode(text, add_special_tokens=False) == wanted, text
        assert loaded.decode(wanted) == made.decode(wanted)
    assert len(loaded) == len(made)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (made.eos_token_id, made.pad_token_id)
    assert loaded.chat_template == CHAT_TEMPLATE
    # What is saved of it has a tokenizer.json.
    loaded.save_pretrained(str(tmp_path / "again"))
    again = load_tokenizer(tmp_path / "again")
    assert [again.encode(t) for t in TEXTS] == [loaded.encode(t) for t in TEXTS]


def test_ids_that_a_vocabulary_cannot_give_are_refused(tmp_path: Path) -> None:
    """Fails if image tokens get other ids than the embedding has rows for."""
    write_vocabulary(tmp_path / "slow", fast(False), ["added_tokens.json"])
    file = tmp_path / "slow/added_tokens.json"
    added = json.loads(file.read_text())
    file.write_text(json.dumps({token: i + 3 for token, i in added.items()}))
    with pytest.raises(ValueError, match=r"the added token '.+' has id \d+, but vocab.json leaves"):
        load_tokenizer(tmp_path / "slow")


def test_another_kind_of_vocabulary_is_refused(tmp_path: Path) -> None:
    """Fails if words are split by the rules of another tokenizer."""
    write_vocabulary(tmp_path / "slow", fast(False), [])
    file = tmp_path / "slow/tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": "GPT2Tokenizer"})
    )
    with pytest.raises(ValueError, match="vocab.json is of a GPT2Tokenizer"):
        load_tokenizer(tmp_path / "slow")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vocab.json", "{"), ("vocab.json", "[]"), ("vocab.json", ""), ("vocab.json", "\ufeff{}"),
        ("merges.txt", "a\nb c d\n"), ("merges.txt", "#version: 0.2\nQQ ZZ\n"),
        ("added_tokens.json", "{"), ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"a": "x"}'),
        ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", "[]"),
        ("tokenizer.json", ""),
    ],
)  # fmt: skip
def test_damaged_files_of_a_tokenizer_are_an_error_that_names_the_folder(
    file: str, text: str, tmp_path: Path
) -> None:
    """Fails if a half-copied folder ends in a traceback, or in a message without the place."""
    write_vocabulary(tmp_path / "slow", fast(False), ["added_tokens.json"])
    (tmp_path / "slow" / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^the tokenizer of model folder {tmp_path / 'slow'}: "):
        load_tokenizer(tmp_path / "slow")


SYSTEM = [{"role": "system", "content": "Be brief."}]
REFUSING = {
    "no system turn": "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}"
    "{% endif %}" + TURNS + OPEN,
    "a system turn": "{% if messages[0].role != 'system' %}{{ raise_exception('Needs one') }}"
    "{% endif %}" + TURNS + OPEN,
    "broken": TURNS + "{% if %}",
    "unfinished": TURNS + "{% if add_generation_prompt %}",
    "an unknown name": "{{ a.b.c }}" + TURNS + OPEN,
    "an unknown filter": "{{ messages | nothing }}" + TURNS + OPEN,
    "text and no text": "{{ 'a' + none }}" + TURNS + OPEN,
    "lists of parts": "{% for m in messages %}{% for part in m.content %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}" + OPEN,
    "lists of parts, strictly": "{% for m in messages %}{{ m.content[0]['text'] }}{% endfor %}"
    + OPEN,
    "the last turn only, and short": "{{ messages[-1].content[:3] }}" + OPEN,
    "no messages": OPEN,
    "empty": "",
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_cannot_show_the_turns_is_a_named_error(name: str) -> None:
    """Fails if it ends in a traceback, or if prompts without their questions are trained on."""
    messages = SYSTEM + USER if name == "no system turn" else USER
    with pytest.raises(ValueError, match="chat template (refuses a prompt|leaves out the content)"):
        render_prompt(with_template(REFUSING[name]), messages, [])


@pytest.mark.parametrize("name", ["no system turn", "a system turn"])
def test_a_template_that_minds_the_system_turn_opens_thoughts(name: str) -> None:
    """Fails if a template is refused for prompts that it can show."""
    messages = SYSTEM + USER if name == "a system turn" else USER
    tokenizer = with_template(REFUSING[name])
    slow, fast = (
        str(tokenizer.decode(render_prompt(tokenizer, messages, [], thinking=thinking)))
        for thinking in (True, False)
    )
    assert slow == fast + "<think>\n" and "How many?" in fast
