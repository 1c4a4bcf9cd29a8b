"""From a request to a job: the mode, the pictures, the prompt."""

import base64
import binascii
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

import numpy as np
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from r1v3.config import Decoding, Serve
from r1v3.data.encoding import Example, encode_sample, escape, share_tiles
from r1v3.data.images import open_image
from r1v3.data.sample import IMAGE_PLACEHOLDER, Sample
from r1v3.data.tiles import ImageShape
from r1v3.evaluation.policy import mode_sampling
from r1v3.rollout.contract import TokenRules
from r1v3.serve.batching import Drawing, Job, Truncation
from r1v3.serve.errors import Refusal
from r1v3.serve.schema import ChatMessage, ChatRequest, TextPart

MODES = ("slow", "nothink", "nowait")
_SEEDS = 2**48
_DATA_ADDRESS = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_MODE_SUFFIX = re.compile(r"(slow|nothink|nowait|budget-\d{1,9})")


@dataclass(frozen=True)
class Mode:
    """A decoding mode: one of `MODES`, and the tokens of a thought, or None for no limit."""

    name: str
    budget: int | None

    @property
    def thinking(self) -> bool:
        """Whether the prompt opens a thought."""
        return self.name != "nothink"


class Prompts:
    """Makes jobs of requests for one model; only one thread may use it.

    Args:
        name: of the model, for clients.
        shape: how its pictures become tiles.
        positions: most tokens of prompt and completion together.
    """

    def __init__(
        self,
        config: Serve,
        name: str,
        tokenizer: PreTrainedTokenizerFast,
        rules: TokenRules,
        shape: ImageShape,
        positions: int,
    ) -> None:
        self.config, self.name, self.tokenizer, self.rules = config, name, tokenizer, rules
        self.shape, self.positions = shape, positions
        self.banned: dict[str, tuple[int, ...]] = {}
        for mode in MODES:
            try:
                sampling, _ = mode_sampling(Decoding(), config.monitor.words, tokenizer, mode)
            except ValueError:  # the vocabulary has no token for a word of NoWait
                continue
            self.banned[mode] = tuple(sorted({*rules.never, *sampling.banned}))

    @property
    def models(self) -> list[str]:
        """Names that clients may ask for: the model, and the model in each mode."""
        return [self.name, *(f"{self.name}-{mode}" for mode in self.banned if mode != "slow")]

    def job(self, request: ChatRequest) -> Job:
        """Make the job of a request.

        Raises:
            Refusal: it cannot be answered, and why.
        """
        mode = self.mode(request)
        samples = request.n or 1
        if samples > self.config.rows:
            told = f"n: {samples} completions, but this server has {self.config.rows} rows"
            raise Refusal(400, told, param="n")
        example = self._example(request.messages, mode)
        left = self.positions - len(example.prompt_ids)
        if left < 1:
            raise Refusal(
                400,
                f"the prompt has {len(example.prompt_ids)} tokens; the model has {self.positions} "
                "positions for prompt and completion together",
                param="messages",
                code="context_length_exceeded",
            )
        asked = request.max_completion_tokens or request.max_tokens or left
        return Job(
            example,
            self._drawing(request, mode),
            samples=samples,
            max_tokens=min(asked, left),
            thinking=mode.thinking,
            budget=mode.budget,
            stops=request.stops,
            stream=bool(request.stream),
        )

    def mode(self, request: ChatRequest) -> Mode:
        """Return the mode that a request asks for, in any of the ways.

        Raises:
            Refusal: there is no such model or mode, or two ways name different ones.
        """
        options = request.chat_template_kwargs
        named = [self._suffix(request.model), request.mode, options.mode if options else None]
        if options is not None and options.enable_thinking is False:
            named.append("nothink")
        budgets = [request.thinking_budget, options.thinking_budget if options else None]
        modes = set()
        for mode in named:
            if mode is None:
                continue
            if not _MODE_SUFFIX.fullmatch(mode):
                raise Refusal(400, f"mode {mode!r:.60} is not {', '.join(MODES)}, budget-N",
                              param="mode")  # fmt: skip
            if mode.startswith("budget-"):
                budgets.append(int(mode.removeprefix("budget-")))
                mode = "slow"
            modes.add(mode)
        limits = {budget for budget in budgets if budget is not None}
        if len(modes) > 1 or len(limits) > 1:
            several = ", ".join(map(str, [*sorted(modes), *sorted(limits)]))
            raise Refusal(400, f"the request names different modes: {several}", param="mode")
        found = Mode(modes.pop() if modes else "slow", limits.pop() if limits else None)
        if found.name not in self.banned:
            raise Refusal(400, f"mode {found.name}: this model's vocabulary has no single tokens "
                          "for the words that it bans", param="mode")  # fmt: skip
        if found.budget is not None and not found.thinking:
            raise Refusal(400, "thinking_budget limits a thought; mode nothink has none",
                          param="thinking_budget")  # fmt: skip
        return found

    def _suffix(self, model: str | None) -> str | None:
        if model in (None, "", self.name):
            return None
        assert model is not None
        mode = model.removeprefix(f"{self.name}-")
        if mode == model or not _MODE_SUFFIX.fullmatch(mode):
            known = ", ".join(self.models)
            raise Refusal(404, f"no model {model!r:.100}; there are {known}, {self.name}-budget-N",
                          param="model", code="model_not_found")  # fmt: skip
        return mode

    def _drawing(self, request: ChatRequest, mode: Mode) -> Drawing:
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed % _SEEDS
        biases = []
        for key, value in (request.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 9) or int(key) >= self._size:
                told = f"logit_bias: {key!r:.40} is not a token id below {self._size}"
                raise Refusal(400, told, param="logit_bias")
            biases.append((int(key), value))
        if request.top_logprobs and not request.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return Drawing(
            1.0 if request.temperature is None else request.temperature,
            seed,
            Truncation(
                request.top_k if request.top_k and request.top_k > 0 else None,
                request.top_p if request.top_p != 1 else None,
                request.min_p or None,
                self.banned[mode.name],
            ),
            tuple(biases),
            (request.top_logprobs or 0) if request.logprobs else 0,
        )

    @property
    def _size(self) -> int:
        return self.rules.size

    def _example(self, messages: Sequence[ChatMessage], mode: Mode) -> Example:
        prompt: list[dict[str, str]] = []
        images: list[bytes] = []
        for number, message in enumerate(messages):
            role = "system" if message.role == "developer" else message.role
            content = self._content(f"messages[{number}].content", message, images)
            prompt.append({"role": role, "content": content})
        shape = share_tiles(self.shape, len(images), self.config.row_tiles)
        if len(images) * shape.tokens_per_tile >= self.positions:
            raise Refusal(
                400,
                f"{len(images)} pictures have at least {len(images) * shape.tokens_per_tile} "
                f"tokens; the model has {self.positions} positions",
                param="messages",
                code="context_length_exceeded",
            )
        try:
            sample = Sample.model_validate(
                {
                    "data_source": "r1v3/serve",
                    "prompt": prompt,
                    "images": images,
                    "ability": None,
                    "reward_model": {"style": "rule", "ground_truth": ""},
                    "extra_info": {"index": 0},
                }
            )
            example = encode_sample(sample, self.tokenizer, shape, thinking=mode.thinking)
            return replace(example, tiles=np.asarray(example.tiles))
        except ValidationError as error:
            told = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise Refusal(400, told, param="messages") from error
        except ValueError as error:
            raise Refusal(400, str(error), param="messages") from error

    def _content(self, where: str, message: ChatMessage, images: list[bytes]) -> str:
        """The text of a turn, with `<image>` where a picture stands; those join `images`."""
        if message.content is None or isinstance(message.content, str):
            return escape(message.content or "")
        lines = []
        for number, part in enumerate(message.content):
            if isinstance(part, TextPart):
                lines.append(escape(part.text))
                continue
            if message.role != "user":
                raise Refusal(400, f"{where}[{number}]: pictures stand in user turns",
                              param="messages")  # fmt: skip
            images.append(self._picture(f"{where}[{number}].image_url", part.url))
            lines.append(IMAGE_PLACEHOLDER)
        return "\n".join(lines)

    def _picture(self, where: str, url: str) -> bytes:
        header = _DATA_ADDRESS.match(url[:200])
        if header is None:
            raise Refusal(
                400,
                f"{where}: {url!r:.60} is not a data:image/...;base64, address; this server "
                "fetches nothing",
                param=where,
                code="invalid_image_url",
            )
        text = url[header.end() :]
        try:
            data = base64.b64decode(
                unquote_to_bytes(text) if "%" in text else text.encode("ascii"), validate=True
            )
        except (binascii.Error, ValueError) as error:
            raise Refusal(400, f"{where} is not base64: {error}", param=where,
                          code="invalid_base64_image") from error  # fmt: skip
        try:
            with open_image(data, where) as image:
                pixels = image.width * image.height
        except ValueError as error:
            raise Refusal(400, str(error), param=where, code="invalid_image") from error
        if pixels > self.config.max_picture_megapixels * 1e6:
            raise Refusal(
                413,
                f"{where} has {pixels / 1e6:.1f} megapixels; at most "
                f"{self.config.max_picture_megapixels:g} are taken",
                param=where,
                code="image_too_large",
            )
        return data
