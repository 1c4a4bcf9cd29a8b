"""Requests that are not answered get a reason in OpenAI's shape, and never a 500."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from r1v3.config import ConfigError, Serve, load
from r1v3.data.special_tokens import SPECIAL_TOKENS
from r1v3.serve.run import load_endpoint
from tests.serve.serving import (
    CHAT,
    MODEL,
    PICTURE,
    QUESTION,
    Served,
    body,
    data_address,
    error_of,
    serving,
    user,
)


def picture(url: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": url}
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


def encoded(width: int, height: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1/a.png", "invalid_image_url"),
        ({"url": "https://example.org/a.png"}, "invalid_image_url"),
        ({"url": "file:///etc/passwd"}, "invalid_image_url"),
        ({"url": "/etc/passwd"}, "invalid_image_url"),
        ({"url": "data:text/html;base64,AAAA"}, "invalid_image_url"),
        ({"url": "data:image/png,abc"}, "invalid_image_url"),
        ({"url": ""}, "invalid_image_url"),
        ({"url": "data:image/png;base64,%%%"}, "invalid_base64_image"),
        ({"url": "data:image/png;base64,ab\u00e9"}, "invalid_base64_image"),
        ({"url": data_address(b"")}, "invalid_image"),
        ({"url": data_address(b"<svg/>")}, "invalid_image"),
        ({"url": data_address(PICTURE[:100])}, None),
        ({"url": data_address(PICTURE[:-40])}, None),
        ({"url": data_address(PICTURE[:60] + b"\0" * 40 + PICTURE[100:])}, None),
        ({"url": 5}, None),
        ({}, None),
        (None, None),
    ],
)
def test_bad_pictures_are_refused(served: Served, url: Any, code: str | None) -> None:
    """Fails if the server fetches an address, reads a file, or fails over a broken picture."""
    error = served.refusal(400, messages=picture(url))
    assert error["code"] == code and "messages" in error["param"]


def test_pictures_of_every_form_are_read(served: Served) -> None:
    """Fails if what clients send is refused: JPEG, a plain address, extra keys, escapes."""
    plain = data_address()
    for url in (
        {"url": plain, "detail": "high", "max_dynamic_patch": 6},
        plain,
        {"url": plain.replace("image/png", "image/PNG").replace("+", "%2B")},
        {"url": "data:;base64," + plain.partition(",")[2]},
        {"url": data_address(encoded(90, 40, "JPEG"), "image/jpeg")},
        {"url": data_address(encoded(90, 40, "WEBP"), "image/webp")},
    ):
        assert served.chat(messages=picture(url), max_tokens=1)["choices"]


def test_large_things_are_refused_by_size() -> None:
    """Fails if one client can fill the memory with a body or a picture."""
    with serving(rows=2, queue=0, max_body_mb=0.05, max_picture_megapixels=0.5) as small:
        error = small.refusal(413, messages=[user("x" * 60_000)])
        assert error["code"] == "body_too_large"
        chunks = iter([b"x" * 30_000] * 3)
        headers = {"Content-Type": "application/json"}
        error_of(small.client.post(CHAT, content=chunks, headers=headers), 413)
        error = small.refusal(413, messages=[user("?", encoded(1000, 600))])
        assert error["code"] == "image_too_large"
        assert small.chat(messages=[user("?", encoded(1000, 400))], max_tokens=1)


@pytest.mark.parametrize("text", ["7 " * 600, "x" * 200_000])
def test_too_long_a_prompt_is_refused(served: Served, text: str) -> None:
    """Fails if a prompt beyond the positions is answered with nonsense, or fails inside."""
    assert served.refusal(400, messages=[user(text)])["code"] == "context_length_exceeded"
    many = [user("?", *[encoded(8, 8)] * 32)]
    assert served.refusal(400, messages=many)["code"] == "context_length_exceeded"


def test_special_tokens_of_a_text_are_text(served: Served) -> None:
    """Fails if a question can end its own turn, or stand for a picture that is not there."""
    smuggled = "".join(SPECIAL_TOKENS) + "<image>"
    turns = [
        {"role": "system", "content": smuggled},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": smuggled},
        user(smuggled, PICTURE),
    ]
    ids = served.chat(messages=turns, max_tokens=1, return_token_ids=True)["prompt_token_ids"]
    words = served.endpoint.prompts.tokenizer
    text = words.decode(ids)
    assert text.count("<|im_end|>") == 4 and text.count("<img>") == text.count("</img>") == 1
    assert text.count("<IMG_CONTEXT>") == 16 and "< |im_end|>" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user"}, {"role": "robot", "content": "x"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"n": 0}, {"n": 9}, {"n": True}, {"n": "2"}, {"n": 10**30},
        {"temperature": -1}, {"temperature": 2.5}, {"temperature": "1"}, {"temperature": [1]},
        {"top_p": 0}, {"top_p": 1.5}, {"top_k": -2}, {"min_p": 2},
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_completion_tokens": -1},
        {"seed": "x"}, {"seed": 1.5}, {"stop": [""]}, {"stop": 5}, {"stop": ["x"] * 17},
        {"top_logprobs": 21, "logprobs": True}, {"top_logprobs": 2}, {"logprobs": 1},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"99999": 1}}, {"logit_bias": {"5": 101}},
        {"logit_bias": [1]}, {"logit_bias": {"\u0665": 1}},
        {"stream": "yes"}, {"stream_options": 5}, {"mode": "fast"}, {"mode": 5},
        {"mode": "nowait", "model": "tiny-internvl-nothink"},
        {"mode": "nothink", "thinking_budget": 5}, {"thinking_budget": -1},
        {"mode": "budget-5", "thinking_budget": 6}, {"thinking_budget": 10**30, "mode": "budget-1"},
        {"chat_template_kwargs": {"enable_thinking": "no"}}, {"chat_template_kwargs": []},
        {"frequency_penalty": 0.5}, {"presence_penalty": 1}, {"repetition_penalty": 1.1},
        {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}},
    ],
    ids=lambda changes: json.dumps(changes)[:50],
)  # fmt: skip
def test_wrong_values_are_refused(served: Served, changes: dict[str, Any]) -> None:
    """Fails if a setting is silently read as another, or one that is not kept is taken."""
    data = json.dumps(body(**changes))
    reply = served.client.post(CHAT, content=data, headers={"Content-Type": "application/json"})
    assert error_of(reply, 400)["param"]


def test_what_means_nothing_here_is_ignored(served: Served) -> None:
    """Fails if a client that sends its usual keys, or null for them, is refused."""
    keys = ("n", "seed", "top_p", "top_k", "min_p", "stop", "stream", "stream_options", "logprobs",
            "logit_bias", "mode", "chat_template_kwargs", "tools", "response_format",
            "frequency_penalty", "max_completion_tokens")  # fmt: skip
    served.chat(max_tokens=1, **dict.fromkeys(keys))
    served.chat(
        max_tokens=1, user="me", metadata={"a": 1}, store=False, top_k=-1, top_p=1, min_p=0,
        repetition_penalty=1.0, presence_penalty=0, tools=[], seed=-(2**70), best_of=3,
        chat_template_kwargs={"enable_thinking": True, "other": 1}, stop=[], logit_bias={},
        response_format={"type": "text"}, temperature=1e-300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'"x"', 400), (b"\xff\xfe", 400),
     (b'{"messages": NaN}', 400), (b'{"seed": ' + b"9" * 5000 + b"}", 400),
     (b'{"a":' * 100_000, 400), (b"[" * 100_000, 400)],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_body_that_is_no_request(served: Served, data: bytes, status: int) -> None:
    """Fails if a body that is no JSON object fails inside the server."""
    reply = served.client.post(CHAT, content=data, headers={"Content-Type": "application/json"})
    error_of(reply, status)


def test_other_routes_and_types(served: Served) -> None:
    """Fails if a website can post a form, or an unknown route answers in another shape."""
    form = served.client.post(
        CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"}
    )
    error_of(form, 415)
    error_of(served.client.get(CHAT), 405)
    error_of(served.client.get("/v1/nothing"), 404)
    error_of(served.client.get("/page/../run.py"), 404)
    assert served.refusal(404, model="gpt-4o")["code"] == "model_not_found"
    assert served.refusal(404, model="tiny-internvl-fast")["param"] == "model"
    error_of(served.client.get("/v1/models/other"), 404)
    names = [card["id"] for card in served.client.get("/v1/models").json()["data"]]
    assert names == ["tiny-internvl", "tiny-internvl-nothink", "tiny-internvl-nowait"]
    for name in names:
        assert served.client.get(f"/v1/models/{name}").json()["id"] == name


def test_another_website_cannot_read_through_a_name_that_points_here(served: Served) -> None:
    """Fails if a page on the internet can rebind its name to loopback and use the server."""
    for host, status in {"evil.example": 403, "localhost:99": 200, "[::1]:8000": 200}.items():
        assert served.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    """Fails if a server with a key answers without it."""
    (tmp_path / "key").write_text("s3cret\n")
    with serving(rows=1, api_key_file=str(tmp_path / "key")) as locked:
        wrong = (b"Bearer s3cre", b"s3cret", b"Bearer s3cret2", b"Bearer \xe9")
        for header in ({}, *({"Authorization": value} for value in wrong)):
            for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics")):
                error_of(locked.client.request(method, path, headers=header), 401)
        assert locked.client.get("/health").status_code == 200
        assert locked.client.get("/").status_code == 200
        locked.client.headers["Authorization"] = "Bearer s3cret"
        assert locked.chat(max_tokens=1)


def test_settings_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Fails if a server starts with an empty key, which anybody can send."""
    (tmp_path / "key").write_text("\n")
    settings = [f"model={MODEL}", f"api_key_file={tmp_path / 'key'}"]
    with pytest.raises(ValueError, match="printable"):
        load_endpoint(load(Serve, None, settings))
    with pytest.raises(ConfigError, match="rows"):
        load(Serve, None, [f"model={MODEL}", "rows=0"])
    with pytest.raises(ConfigError, match="did you mean `port`"):
        load(Serve, None, [f"model={MODEL}", "ports=1"])


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip
KEYS = st.sampled_from(
    ["model", "messages", "n", "seed", "temperature", "top_p", "top_k", "min_p", "stop", "stream",
     "logprobs", "top_logprobs", "logit_bias", "mode", "thinking_budget", "chat_template_kwargs",
     "stream_options", "response_format", "tools", "max_completion_tokens", "return_token_ids"]
)  # fmt: skip
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | JSON,
         "content": st.text(max_size=20) | JSON | st.lists(st.fixed_dictionaries(
             {"type": st.sampled_from(["text", "image_url"]), "text": JSON,
              "image_url": JSON | st.binary(max_size=9).map(data_address)}), max_size=2)}
    ), max_size=3,
)  # fmt: skip


@given(st.dictionaries(KEYS, JSON, max_size=4), st.none() | TURNS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(
    served: Served, changes: dict[str, Any], turns: Any
) -> None:
    """Fails if some JSON is answered with a 500, or in another shape than OpenAI's."""
    request = {**body(max_tokens=2), **changes}
    if turns is not None:
        request["messages"] = turns
    reply = served.client.post(
        CHAT, content=json.dumps(request), headers={"Content-Type": "application/json"}
    )
    if reply.status_code != 200:
        assert reply.status_code in (400, 404), reply.text
        error_of(reply, reply.status_code)
    assert served.endpoint.batcher.alive
