"""Requests to a vLLM server and the reading of its answers.

Read from the documentation of vLLM 0.32 and from its source of September 2026
(`entrypoints/openai/{completion,chat_completion}/protocol.py`, `entrypoints/chat_utils.py`,
`sampling_params.py`, `v1/worker/gpu/sample/{sampler,logit_bias}.py`, `models/interns1.py`):

- A text-only prompt goes to /v1/completions as token ids. A prompt with pictures can only be given
  as a chat (token ids with pictures need the scale-out endpoints, which are off by default), so it
  goes to /v1/chat/completions: the pictures as PNG data URLs, the text with a placeholder for
  each. Either way `return_token_ids` brings the prompt's ids back, and they must
  be the trainer's.
- Settings that are not sent are filled in from the model's generation_config.json; all are sent.
  With `ignore_eos`, the end-of-turn token in `stop_token_ids` is the only one that ends a
  completion; it is part of the returned ids.
- `logit_bias` of -100 is the ban that both model runners know; they add it before the softmax.
- Log-probs at the sampling temperature and after bans need `--logprobs-mode processed_logprobs`;
  vLLM's default is before both. `probe` tells the two apart.
- A chat cannot be continued by token ids, so a thought over pictures is closed by the server, with
  r1v3's logits processor (`VLLM_USE_V2_MODEL_RUNNER=0 vllm serve --logits-processors
  r1v3.integrations.vllm:ThoughtBudget`), which `vllm_xargs` asks for. vLLM ignores arguments that
  no processor knows, so every completion is checked for it.
- Completion i of a request with seed s is drawn with seed s + i. Greedy decoding wants n = 1.
- The placeholder is `<image>` for a model folder in the original layout (InternVLChatModel,
  SkyworkR1VChatModel) and `<IMG_CONTEXT>` for a native one (InternVLForConditionalGeneration).
  vLLM cuts tiles itself: from what config.json says for the original layout, and, for the native
  one, with the image processor of transformers, from the files that
  `conversion.serving.write_serving_files` writes. That one resizes with torchvision, which differs
  from PIL by at most one of 256 levels. The 38B is published in the original layout, which vLLM
  serves with --trust-remote-code.
- A picture carries a name of its content and of the weights' step: vLLM keeps the output of the
  vision tower by that name, and must not reuse it after the tower was trained.
"""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v3.config import Pictures
from r1v3.data.sample import IMAGE_PLACEHOLDER
from r1v3.data.special_tokens import IMAGE_CONTEXT
from r1v3.data.tiles import decode_picture
from r1v3.http import RequestFailed
from r1v3.model.conversion.config import is_original, read_config
from r1v3.rollout.completions import (
    Completion,
    ban_list,
    check_completion,
    check_prompt,
    closed_by_server,
)
from r1v3.rollout.contract import Request, Sampling, TokenRules

# vLLM raises lower temperatures to this one (`sampling_params._MAX_TEMP`).
LOWEST_TEMPERATURE = 0.01
_BAN = -100
_REPLY_BYTES, _REPLY_BYTES_PER_TOKEN = 1 << 20, 2048


@dataclass(frozen=True)
class Call:
    """One request to a server and the form of its answer.

    Attributes:
        path: of the endpoint, below the server's address.
        body: without the model's name, which differs from server to server.
        prompt_ids: the prompt that the server must report.
        count: number of completions.
        budget: tokens after which the server closes a thought; None sets no limit.
    """

    path: str
    body: dict[str, Any]
    prompt_ids: tuple[int, ...]
    count: int
    max_tokens: int
    banned: frozenset[int]
    budget: int | None = None

    @property
    def max_bytes(self) -> int:
        """Largest answer that is read."""
        tokens = self.count * (self.max_tokens + len(self.prompt_ids))
        return _REPLY_BYTES + _REPLY_BYTES_PER_TOKEN * tokens


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError for settings that vLLM would change silently."""
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature {sampling.temperature} is raised to {LOWEST_TEMPERATURE} by vLLM; "
            "use 0 (greedy) or at least that"
        )


def _settings(
    sampling: Sampling, rules: TokenRules, *, count: int, max_tokens: int, seed: int
) -> dict[str, Any]:
    return {
        "n": count,
        "seed": seed,
        "temperature": sampling.temperature,
        "max_tokens": max_tokens,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [rules.stop_id],
        "logit_bias": {str(token): _BAN for token in ban_list(sampling, rules)},
        "skip_special_tokens": False,
        "return_token_ids": True,
        "stream": False,
    }


def completion_call(
    prompt_ids: tuple[int, ...],
    sampling: Sampling,
    rules: TokenRules,
    *,
    count: int,
    max_tokens: int,
    seed: int,
) -> Call:
    """Build the request for completions of token ids, without pictures."""
    body = {
        "prompt": list(prompt_ids),
        "logprobs": 1,
        **_settings(sampling, rules, count=count, max_tokens=max_tokens, seed=seed),
    }
    banned = frozenset(ban_list(sampling, rules))
    return Call("/v1/completions", body, prompt_ids, count, max_tokens, banned)


def placeholder_of(model_folder: Path) -> str:
    """Return the placeholder for a picture in the text that vLLM renders for this model folder."""
    return IMAGE_PLACEHOLDER if is_original(read_config(model_folder)) else IMAGE_CONTEXT


def tiling(max_tiles: int, placeholder: str) -> dict[str, int]:
    """Return the setting of vLLM's picture processor for a prompt with its own number of tiles."""
    return {"max_dynamic_patch" if placeholder == IMAGE_PLACEHOLDER else "max_patches": max_tiles}


def picture_name(data: bytes, pictures: Pictures, step: int, max_tiles: int | None = None) -> str:
    """Return a name for the tiles of a picture and the vision tower of this step."""
    own = "" if max_tiles is None else f"-{max_tiles}"
    return f"{hashlib.sha256(data).hexdigest()[:32]}-{pictures.ground}-{step}{own}"


def _picture_part(data: bytes, request: Request, step: int) -> dict[str, Any]:
    """A picture as the trainer decodes it: lossless, without transparency or rotation tags."""
    file, pictures = io.BytesIO(), request.pictures
    decode_picture(data, pictures).save(file, "PNG", compress_level=1)
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {
        "type": "image_url",
        "image_url": {"url": address},
        "uuid": picture_name(data, pictures, step, request.max_tiles),
    }


def chat_call(
    request: Request,
    sampling: Sampling,
    rules: TokenRules,
    *,
    count: int,
    max_tokens: int,
    seed: int,
    step: int,
    placeholder: str,
) -> Call:
    """Build the request for completions of a prompt with pictures, rendered by the server.

    A budget in `sampling` is kept by the server.
    """
    images = iter(request.sample.images)
    messages = []
    for message in request.sample.prompt:
        text, content = message["content"], []
        for _ in range(text.count(IMAGE_PLACEHOLDER)):
            content.append(_picture_part(next(images), request, step))
        text = text.replace(IMAGE_PLACEHOLDER, placeholder)
        parts = [*content, {"type": "text", "text": text}]
        messages.append({"role": message["role"], "content": parts if content else text})
    body = {
        "messages": messages,
        "logprobs": True,
        "top_logprobs": 1,
        "chat_template_kwargs": {"enable_thinking": request.thinking},
        **_settings(sampling, rules, count=count, max_tokens=max_tokens, seed=seed),
    }
    if request.max_tiles is not None:
        body["mm_processor_kwargs"] = tiling(request.max_tiles, placeholder)
    if sampling.budget is not None:
        body["vllm_xargs"] = {"thought_budget": sampling.budget}
    prompt = request.example.prompt_ids
    banned = frozenset(ban_list(sampling, rules))
    path = "/v1/chat/completions"
    return Call(path, body, prompt, count, max_tokens, banned, sampling.budget)


def read_answer(call: Call, reply: bytes, rules: TokenRules, origin: str) -> list[Completion]:
    """Read the completions of an answer, in order, from its token ids alone.

    Raises:
        RequestFailed: the answer is malformed or impossible; another server may do better.
        ValueError: the server completed another prompt, as `check_prompt`, or does not close
            thoughts.
    """
    chat = "messages" in call.body
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise RequestFailed(f"malformed answer: not JSON ({error})", retry=True) from error
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise RequestFailed("malformed answer: no list of choices", retry=True)
    indices = [choice.get("index") for choice in choices]
    if sorted(map(str, indices)) != sorted(map(str, range(call.count))):
        raise RequestFailed(
            f"malformed answer: choices {str(indices):.60} instead of 0 to {call.count - 1}",
            retry=True,
        )
    found: list[Completion] = []
    for choice in sorted(choices, key=lambda choice: int(choice["index"])):
        check_prompt((answer if chat else choice).get("prompt_token_ids"), call.prompt_ids, origin)
        try:
            found.append(
                check_completion(
                    choice.get("token_ids"),
                    _logprobs(choice.get("logprobs"), chat),
                    choice.get("finish_reason"),
                    rules=rules,
                    banned=call.banned,
                    max_tokens=call.max_tokens,
                )
            )
        except ValueError as error:
            reason = f"impossible answer: choice {choice['index']}: {error}"
            raise RequestFailed(reason, retry=True) from error
    if call.budget is None:
        return found
    try:
        return [closed_by_server(one, call.budget, call.max_tokens, rules) for one in found]
    except ValueError as error:
        raise ValueError(
            f"{origin} does not close thoughts over pictures ({error}); it must be started with "
            "--logits-processors r1v3.integrations.vllm:ThoughtBudget and, in its environment, "
            "VLLM_USE_V2_MODEL_RUNNER=0; or sample locally or colocated"
        ) from error


def _logprobs(given: object, chat: bool) -> object:
    """The log-probs of the sampled tokens, in either endpoint's structure."""
    if not isinstance(given, dict):
        return None
    if not chat:
        return given.get("token_logprobs")
    content = given.get("content")
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return None
    return [entry.get("logprob") for entry in content]


def probe_call(rules: TokenRules, token: int) -> Call:
    """Build the request for one token with a bias of 100: only its processed log-prob is 0."""
    prompt = (rules.pad_id,)
    settings = _settings(Sampling(1.0, 1), rules, count=1, max_tokens=1, seed=0)
    bias = {"logit_bias": {str(token): 100}}
    body = {"prompt": list(prompt), "logprobs": 1, **settings, **bias}
    return Call("/v1/completions", body, prompt, 1, 1, frozenset())


def read_probe(call: Call, reply: bytes, rules: TokenRules, token: int, origin: str) -> None:
    """Check that a server applies biases and reports log-probs after them.

    Raises:
        RequestFailed: as `read_answer`.
        ValueError: it does not; names the flag to start it with.
    """
    (completion,) = read_answer(call, reply, rules, origin)
    if completion.token_ids != (token,):
        raise ValueError(f"{origin} does not apply logit_bias, with which tokens are banned")
    if completion.logprobs[0] < -1e-3:
        raise ValueError(
            f"{origin} reports log-probs from before bans and temperature; it must be started "
            "with --logprobs-mode processed_logprobs"
        )
