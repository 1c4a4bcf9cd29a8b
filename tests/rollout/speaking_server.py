"""A real HTTP server that speaks vLLM's dialect; a tiny model answers, and faults are scripted."""

import base64
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from r1v3.data.encoding import Example, encode_sample
from r1v3.data.sample import Sample, make_sample
from r1v3.data.special_tokens import IMAGE_CONTEXT
from r1v3.engine.hf.decoder import HFDecoder
from r1v3.model.internvl import load_model
from r1v3.rollout.contract import Request, Rollout, Sampling, TokenRules
from r1v3.rollout.local import LocalSampler
from tests import tiny
from tests.loopback import LoopbackServer

RULES = TokenRules.of(tiny.tokenizer())
_MODEL = threading.Lock()  # of both servers: one core computes anyway

# Done to the finished answer of one request; it may write to the handler itself and return None.
Fault = Callable[["SpeakingServer", BaseHTTPRequestHandler, dict[str, Any]], dict[str, Any] | None]


def local(
    net: InternVLForConditionalGeneration, example: Example, sampling: Sampling, n: int, seed: int
) -> Rollout:
    """The answer that a request must get: local generation under the request's seed."""
    request = Request(example, make_sample(question="?", ground_truth="", data_source="", index=0))
    generator = torch.Generator().manual_seed(seed)
    with _MODEL:
        sampler = LocalSampler(HFDecoder(net), RULES)
        return sampler.complete([request], sampling, group_size=n, generator=generator)


class SpeakingServer(LoopbackServer):
    """One server.

    Attributes:
        faults: done to the next completion requests, one each; probes are left alone.
        asked: bodies of the completion requests so far. controls: paths of the other POSTs.
        loads: folder that `reload_weights` loads from. raw: log-probs from before the bias.
        placeholder: what stands for a picture in a chat. closes: it has the logits processor for
        thought budgets.
    """

    def __init__(self, net: InternVLForConditionalGeneration, port: int = 0) -> None:
        self.net = net
        self.faults: deque[Fault] = deque()
        self.asked: list[dict[str, Any]] = []
        self.controls: list[str] = []
        self.loads: Path | None = None
        self.raw = False
        self.placeholder = IMAGE_CONTEXT
        self.closes = True
        self.ending = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers = {"/health": {}, "/v1/models": {"data": [{"id": "tiny"}]}}
                server.reply(self, answers.get(self.path), 200 if self.path in answers else 404)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                try:
                    server.post(self, body)
                except OSError:  # the client went away, as it does from late servers
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(Handler, port)

    def reply(self, handler: BaseHTTPRequestHandler, content: Any, status: int = 200) -> None:
        payload = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if not handler.path.startswith("/v1/"):
            self.controls.append(handler.path)
            if self.loads is None:
                return self.reply(handler, {"detail": "Not Found"}, 404)
            if body.get("method") == "reload_weights":
                self.net = load_model(self.loads).eval()
            return self.reply(handler, {})
        probed = [int(k) for k, bias in body["logit_bias"].items() if bias == 100]
        if probed:
            return self.reply(handler, self.probe(body, probed[0]))
        self.asked.append(body)
        answer: dict[str, Any] | None = self.answer(body)
        if self.faults:
            answer = self.faults.popleft()(self, handler, answer or {})
        if answer is not None:
            self.reply(handler, answer)

    def probe(self, body: dict[str, Any], token: int) -> dict[str, Any]:
        with _MODEL, torch.no_grad():
            logits = self.net(input_ids=torch.tensor([body["prompt"]])).logits[0, -1]
        if not self.raw:
            logits[token] += 100
        logprob = float(torch.log_softmax(logits, -1)[token])
        choice = {
            "index": 0,
            "token_ids": [token],
            "finish_reason": "length",
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [logprob]},
        }
        return {"choices": [choice]}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A true answer to a completion or chat request."""
        assert body["model"] == "tiny" and body["top_p"] == 1.0 and body["top_k"] == 0
        assert body["ignore_eos"] and body["stop_token_ids"] == [RULES.stop_id]
        assert body["n"] == 1 or body["temperature"] > 0
        chat = "messages" in body
        if chat:
            example = encode_sample(
                read_chat(body, self.placeholder),
                tiny.tokenizer(),
                tiny.SHAPE,
                thinking=body["chat_template_kwargs"]["enable_thinking"],
            )
        else:
            empty = np.zeros((0, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), dtype=np.uint8)
            example = Example(tuple(body["prompt"]), empty)
        banned = tuple(int(k) for k, bias in body["logit_bias"].items() if bias == -100)
        budget = body.get("vllm_xargs", {}).get("thought_budget") if self.closes else None
        sampling = Sampling(body["temperature"], body["max_tokens"], banned, budget)
        found = local(self.net, example, sampling, body["n"], body["seed"])
        prompt = list(example.prompt_ids)
        choices = []
        for row in range(body["n"]):
            ids = found.response_ids[row][found.mask[row]].tolist()
            values = found.logprobs[row][found.mask[row]].tolist()
            content = {"content": [{"token": "?", "logprob": value} for value in values]}
            choice = {
                "index": row,
                "token_ids": ids,
                "finish_reason": "stop" if found.finished[row] else "length",
                "logprobs": content if chat else {"token_logprobs": values},
                # Text is never to be trusted: here it is always wrong.
                "message" if chat else "text": "nonsense",
            }
            choices.append(choice if chat else {**choice, "prompt_token_ids": prompt})
        choices.reverse()  # the index says which is which, not the order
        return {"choices": choices, **({"prompt_token_ids": prompt} if chat else {})}


def read_chat(body: dict[str, Any], placeholder: str) -> Sample:
    """The sample that a chat request was made of."""
    pictures, prompt = [], []
    for message in body["messages"]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                pictures.append(base64.b64decode(data))
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        assert text.count(placeholder) == len(parts) - 1
        text = text.replace(placeholder, "<image>")
        prompt.append({"role": message["role"], "content": text})
    row = make_sample(question="?", ground_truth="", data_source="", index=0).to_row()
    return Sample.model_validate({**row, "prompt": prompt, "images": pictures})


def status(code: int) -> Fault:
    """The request is refused."""

    def fault(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> None:
        server.reply(handler, {"error": {"message": "scripted"}}, code)

    return fault


def hang(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> None:
    """No answer, until the server ends."""
    server.ending.wait(60)


def slow(seconds: float) -> Fault:
    """The true answer, late."""

    def fault(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> dict[str, Any]:
        server.ending.wait(seconds)
        return answer

    return fault


def truncated(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> None:
    """Half of the JSON, under a length that says it is all."""
    payload = json.dumps(answer).encode()
    payload = payload[: len(payload) // 2]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload)


def cut(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> None:
    """The connection ends in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def changed(change: Callable[[dict[str, Any]], None]) -> Fault:
    """An answer that is not true; `change` gets its first choice."""

    def fault(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["choices"][0])
        return answer

    return fault


@contextmanager
def serving(*nets: InternVLForConditionalGeneration) -> Iterator[list[SpeakingServer]]:
    servers = [SpeakingServer(net) for net in nets]
    try:
        yield servers
    finally:
        for server in servers:
            server.ending.set()
            server.stop()
