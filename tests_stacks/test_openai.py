"""The `openai` package as a client of `r1v3 serve`, which runs in r1v3's own environment."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests_stacks.serving import ROOT, serving

openai = pytest.importorskip("openai")

PICTURE = base64.b64encode((ROOT / "assets" / "example.png").read_bytes()).decode()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client with a key of the demo's base model."""
    key = tmp_path_factory.mktemp("serve") / "key"
    key.write_text("s3cret")
    with serving(f"api_key_file={key}") as address:
        yield openai.OpenAI(base_url=address, api_key="s3cret", max_retries=0)


def ask(client: Any, **changes: Any) -> Any:
    """A greedy completion about the picture."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
    content = [picture, {"type": "text", "text": "Compute the result."}]
    settings = {"model": "tiny-internvl-nothink", "temperature": 0, "max_tokens": 32, **changes}
    return client.chat.completions.create(
        messages=[{"role": "user", "content": content}], **settings
    )


def test_models_are_listed(client: Any) -> None:
    """Fails if the client cannot read the list of models, which is the modes."""
    names = [model.id for model in client.models.list()]
    assert names == ["tiny-internvl", "tiny-internvl-nothink", "tiny-internvl-nowait"]
    assert client.models.retrieve(names[1]).id == names[1]


def test_answers_thoughts_and_usage_are_read(client: Any) -> None:
    """Fails if a field of an answer is not where the client looks."""
    answer = ask(client, n=3, temperature=1, seed=1, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content for choice in answer.choices)
    entries = [entry for choice in answer.choices for entry in choice.logprobs.content]
    assert answer.usage.completion_tokens == len(entries)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    thinking = ask(client, model="tiny-internvl", extra_body={"thinking_budget": 5})
    message = thinking.choices[0].message
    assert message.reasoning_content and message.content
    assert thinking.usage.completion_tokens_details.reasoning_tokens > 0


def test_a_stream_joins_to_the_answer(client: Any) -> None:
    """Fails if the client reads other text from a stream."""
    whole = ask(client, model="tiny-internvl", max_tokens=48)
    parts = ask(client, model="tiny-internvl", max_tokens=48, stream=True,
                stream_options={"include_usage": True})  # fmt: skip
    thought = answer = ""
    for part in parts:
        if part.choices:
            thought += getattr(part.choices[0].delta, "reasoning_content", None) or ""
            answer += part.choices[0].delta.content or ""
        else:
            assert part.usage == whole.usage
    message = whole.choices[0].message
    assert (thought, answer) == (message.reasoning_content or "", message.content)


def test_errors_are_the_clients_own(client: Any) -> None:
    """Fails if a refusal is raised as another kind of error than OpenAI's servers cause."""
    for error, changes in (
        (openai.BadRequestError, {"n": 99}),
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ):
        with pytest.raises(error):
            ask(client, **changes)
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"))


def test_eight_at_once(client: Any) -> None:
    """Fails if requests at once are answered otherwise than one by one."""
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: ask(client, temperature=1, seed=seed), range(8)))
    apart = [ask(client, temperature=1, seed=seed) for seed in range(8)]
    texts = [answer.choices[0].message.content for answer in together]
    assert texts == [answer.choices[0].message.content for answer in apart]
