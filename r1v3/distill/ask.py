"""Asks a teacher what has no answer yet.

An answer is `row` (the question's id), `sample`, `seed`, `reasoning`, `content`, `finish`,
`prompt_tokens` and `tokens`. It is kept as soon as it comes. The seed of a sample depends on the
run's seed, the question and its number alone, so that a teacher that honors seeds says the same
whenever it is asked.
"""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from r1v3.config import Distill, DistillTeacher
from r1v3.data.images import load_image, open_image
from r1v3.data.sample import IMAGE_PLACEHOLDER, Sample
from r1v3.distill.endpoint import Client, connect, usage_of
from r1v3.distill.work import Entry, Job, keep_in, work
from r1v3.http import RequestFailed
from r1v3.journal import Journal

# What servers take as it is; others are sent as PNG.
_SENT_AS_IS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
CHARACTERS_PER_TOKEN = 3.5


def answers_journal(config: Distill) -> Journal:
    """The file of the teacher's answers, whose name depends on what they depend on."""
    teacher = config.teacher
    settings = teacher.model_dump(
        include={"model", "system", "instruction", "temperature", "max_tokens", "body"}
    )
    return Journal(config.run / "distill", "answers", {"seed": config.seed, **settings})


def request_seed(seed: int, row: str, sample: int) -> int:
    """The seed of one answer, of 31 bits."""
    digest = hashlib.sha256(f"{seed}\0{row}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def read_index(
    journal: Journal, look: Callable[[Entry], None] = lambda entry: None
) -> dict[str, dict[int, int]]:
    """The position of every kept entry, by question and sample.

    Args:
        look: called with every entry.

    Raises:
        ValueError: a line is damaged; names it.
    """
    index: dict[str, dict[int, int]] = {}
    for number, position, fields in journal.read():
        row, sample = fields.get("row"), fields.get("sample")
        if not isinstance(row, str) or type(sample) is not int:
            raise ValueError(f"{journal.path} line {number} names no row and sample; remove it")
        if sample not in index.setdefault(row, {}):
            index[row][sample] = position
            look(fields)
    return index


async def ask(
    config: Distill,
    missing: Mapping[str, Sequence[int]],
    samples: Iterable[tuple[str, Sample]],
    journal: Journal,
    notify: Callable[[int], None],
) -> Counter[str]:
    """Ask for answers and append each to the journal; count what failed by reason.

    Args:
        missing: numbers of the samples to ask for, by question.
        samples: the questions with their pictures, drawn as they are asked.
        notify: told how many answers came.

    Raises:
        Unusable: the teacher cannot be used.
    """
    expected = config.teacher.expect_tokens
    async with connect(config.teacher, "the teacher", expected) as client:
        return await work(
            _jobs(config, missing, samples, client),
            keep_in(journal, notify),
            concurrency=config.teacher.concurrency,
            what="the teacher",
        )


def _jobs(
    config: Distill,
    missing: Mapping[str, Sequence[int]],
    samples: Iterable[tuple[str, Sample]],
    client: Client,
) -> Iterator[Job]:
    for row, sample in samples:
        messages = teacher_messages(sample, config.teacher)
        for number in missing[row]:
            known = {
                "row": row,
                "sample": number,
                "seed": request_seed(config.seed, row, number),
            }
            yield Job(
                partial(_one, config.teacher, client, messages, known), partial(_refusal, known)
            )


async def _one(
    teacher: DistillTeacher, client: Client, messages: list[dict[str, Any]], known: Entry
) -> Entry:
    body = {
        "model": teacher.model,
        "messages": messages,
        "temperature": teacher.temperature,
        "max_tokens": teacher.max_tokens,
        "seed": known["seed"],
    }
    tokens = _prompt_tokens(teacher, messages)
    return {**known, **await client.post("/chat/completions", body, read_reply, tokens)}


def _refusal(known: Entry, reason: str) -> Entry:
    """The entry of a question that the teacher refuses, such as one that is too long for it."""
    return {
        **known,
        "reasoning": None,
        "content": reason,
        "finish": "refused",
        "prompt_tokens": None,
        "tokens": None,
    }


def read_reply(reply: Mapping[str, Any]) -> Entry:
    """The part of an entry that a chat completion holds.

    Raises:
        RequestFailed: it is malformed; another attempt may do better.
    """
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        finish = choice.get("finish_reason") or "stop"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestFailed("a reply without a message", retry=True) from error
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if not all(isinstance(text, str) for text in (content, reasoning, finish)):
        raise RequestFailed("a reply whose message is no text", retry=True)
    if not content and not reasoning and finish == "stop":
        raise RequestFailed("an empty reply", retry=True)
    prompt_tokens, tokens = usage_of(reply)
    return {
        "reasoning": _unicode(reasoning) or None,
        "content": _unicode(content),
        "finish": finish,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
    }


def _unicode(text: str) -> str:
    """A text that UTF-8 can carry: JSON can spell half of a surrogate pair, which it cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def teacher_messages(sample: Sample, teacher: DistillTeacher) -> list[dict[str, Any]]:
    """The turns of a question as the teacher is asked them."""
    turns = [{"role": str(turn["role"]), "content": turn["content"]} for turn in sample.prompt]
    if teacher.system is not None:
        turns = [turn for turn in turns if turn["role"] != "system"]
        turns.insert(0, {"role": "system", "content": teacher.system})
    if teacher.instruction is not None:
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turns[last]["content"] += f"\n\n{teacher.instruction}"
    return chat_messages(turns, sample.images)


def chat_messages(
    turns: Sequence[Mapping[str, str]], images: Sequence[bytes]
) -> list[dict[str, Any]]:
    """Turns in OpenAI's form, with each picture where its placeholder stands."""
    left = iter(images)
    messages = []
    for turn in turns:
        texts = turn["content"].split(IMAGE_PLACEHOLDER)
        parts: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            if i:
                parts.append({"type": "image_url", "image_url": {"url": _address(next(left))}})
            if text.strip():
                parts.append({"type": "text", "text": text.strip("\n")})
        whole = parts if len(texts) > 1 else turn["content"]
        messages.append({"role": turn["role"], "content": whole})
    return messages


def _address(image: bytes) -> str:
    """A picture as a `data:` address."""
    with open_image(image, "picture") as opened:
        kind = _SENT_AS_IS.get(opened.format or "")
    if kind is None:
        file = io.BytesIO()
        load_image(image, truncated="accept").save(file, "PNG")
        image, kind = file.getvalue(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _prompt_tokens(teacher: DistillTeacher, messages: Sequence[Mapping[str, Any]]) -> float:
    if teacher.expect_prompt_tokens is not None:
        return teacher.expect_prompt_tokens
    characters = pictures = 0
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [{"text": content}]:
            characters += len(part.get("text", ""))
            pictures += "image_url" in part
    return characters / CHARACTERS_PER_TOKEN + pictures * teacher.picture_tokens
