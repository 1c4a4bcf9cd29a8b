"""A byte-level BPE tokenizer in Qwen2's layout, with InternVL's special tokens.

As in the 38B's tokenizer, `<think>` and `</think>` are ordinary text of several tokens, not special
tokens, and every decimal digit is a token of its own.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from r1v3.data.special_tokens import (
    END_OF_TEXT,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    SPECIAL_TOKENS,
    TURN_END,
)
from r1v3.data.thoughts import THINK_OPEN
from r1v3.files import read_json_object

SYSTEM_PROMPT = "You are a helpful assistant."

# Qwen2's split: words with one leading mark, single digits, runs of punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Slow thinking opens the assistant turn with <think>; NoThink leaves it out (report, section 6.2).
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is not defined or enable_thinking -%}{{ '<think>\\n' }}{%- endif -%}"
    "{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a BPE vocabulary of at most `vocab_size` (special tokens included) from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder, with a chat template that opens thoughts.

    The folder must hold `tokenizer.json`, or `vocab.json` and `merges.txt` of a Qwen2 tokenizer,
    with its added tokens in `added_tokens.json` or `tokenizer_config.json`.

    Raises:
        ValueError: these files are missing or damaged, or are of another tokenizer.
    """
    folder = Path(directory)
    whole = (folder / "tokenizer.json").is_file()
    if not whole and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ValueError(
            f"model folder {directory} has no tokenizer.json, nor vocab.json and merges.txt"
        )
    try:
        if whole:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        else:
            tokenizer = _from_vocabulary(folder)
    except Exception as error:  # tokenizers raises plain Exception, transformers many types
        raise ValueError(f"the tokenizer of model folder {directory}: {error}") from error
    tokenizer.chat_template = thinking_template(tokenizer)
    return tokenizer


def _from_vocabulary(folder: Path) -> PreTrainedTokenizerFast:
    config = _json(folder / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class", "Qwen2Tokenizer")).removesuffix("Fast")
    if kind != "Qwen2Tokenizer":
        raise ValueError(
            f"it has no tokenizer.json, and its vocab.json is of a {kind}: only a "
            "Qwen2Tokenizer is read from vocab.json and merges.txt; save its tokenizer.json there"
        )
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder))
    added = {str(t["content"]): int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    for token, wanted in {**_json(folder / "added_tokens.json"), **added}.items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != wanted:
            raise ValueError(
                f"the added token {token!r} has id {wanted}, but vocab.json leaves {found} for it"
            )
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def thinking_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the chat template of a tokenizer, made to open thoughts as `enable_thinking` says.

    Slow thinking opens the assistant turn with `<think>`, NoThink does not. Which of the two a
    template does is found by rendering it both ways. Plain ChatML ignores the setting, as do
    templates that always open a thought; the tag is then added, or taken away. A tokenizer without
    a template gets `CHAT_TEMPLATE`, which is ChatML.

    Raises:
        ValueError: the template cannot be rendered, with a system turn or without.
    """
    if tokenizer.chat_template is None:
        return CHAT_TEMPLATE
    return _opening(tokenizer, tokenizer.get_chat_template())


@functools.lru_cache(maxsize=8)
def _opening(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    user = {"role": "user", "content": "?"}

    def opens(thinking: bool) -> bool:
        try:
            text = _rendered(tokenizer, template, [user], thinking)
        except ValueError:  # some demand a system turn
            system = {"role": "system", "content": SYSTEM_PROMPT}
            text = _rendered(tokenizer, template, [system, user], thinking)
        return text.rstrip().endswith(THINK_OPEN)

    asked = "(enable_thinking is not defined or enable_thinking)"
    added, taken_away = not opens(True), opens(False)
    if added or taken_away:
        # Jinja drops it where it ends a template.
        template = template.removesuffix("\n")
    if taken_away:
        template = (
            "{% set rendered_chat %}" + template + "{% endset %}"
            f"{{% if add_generation_prompt and not {asked} %}}"
            f"{{{{ rendered_chat.rstrip().removesuffix('{THINK_OPEN}') }}}}"
            "{% else %}{{ rendered_chat }}{% endif %}"
        )
    if added:
        template += (
            f"{{% if add_generation_prompt and {asked} %}}{{{{ '{THINK_OPEN}\\n' }}}}{{% endif %}}"
        )
    return template


def _rendered(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, str]],
    thinking: bool,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    except (TemplateError, TypeError) as error:  # TypeError: it adds texts to what is no text
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the model's chat template refuses a prompt of the turns {roles}: {error}"
        ) from error
    return str(text)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return found


def render_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    image_tokens: list[int],
    *,
    thinking: bool = True,
) -> list[int]:
    """Token ids of a chat prompt with its image placeholders expanded.

    Args:
        messages: roles and contents; each `<image>` stands for one picture.
        image_tokens: how many context tokens each picture takes, in order.
        thinking: open the assistant turn with `<think>` (slow thinking) or not (NoThink),
            whether the tokenizer's own template heeds it or not; see `thinking_template`.

    Raises:
        ValueError: placeholders and pictures differ in number, a message smuggles in a special
            token, or the chat template refuses the messages or leaves a question out.
    """
    safe = []
    for message in messages:
        content = str(message["content"])
        found = [token for token in SPECIAL_TOKENS if token in content]
        if found:
            raise ValueError(f"the {message['role']} message contains the special token {found[0]}")
        safe.append({"role": message["role"], "content": content})
    text = _rendered(tokenizer, thinking_template(tokenizer), safe, thinking)
    for message in safe:
        # Templates may drop earlier thoughts; those for lists of parts drop texts altogether.
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise ValueError(
                f"the model's chat template leaves out the content of a {message['role']} turn"
            )
    pieces = text.split("<image>")
    if len(pieces) - 1 != len(image_tokens):
        raise ValueError(
            f"the prompt has {len(pieces) - 1} <image> placeholders for {len(image_tokens)} images"
        )
    short = (IMAGE_START + IMAGE_CONTEXT + IMAGE_END).join(pieces)
    ids: list[int] = tokenizer.encode(short, add_special_tokens=False)
    return _repeated(ids, token_id(tokenizer, IMAGE_CONTEXT), image_tokens) if image_tokens else ids


def _repeated(ids: list[int], token: int, counts: list[int]) -> list[int]:
    """Each occurrence of a token as often as its count says: thousands need no tokenizing."""
    places = [place for place, found in enumerate(ids) if found == token]
    if len(places) != len(counts):
        raise ValueError(
            f"the prompt has {len(places)} {IMAGE_CONTEXT} tokens for {len(counts)} images; "
            "the chat template must not write them itself"
        )
    repeated: list[int] = []
    for begin, end, count in zip([-1, *places], places, counts, strict=False):
        repeated += ids[begin + 1 : end] + [token] * count
    return repeated + ids[places[-1] + 1 :]
