"""A random InternVL of two layers, its tokenizer, and a few samples, for tests that need a model.

Importable by every test folder; the tokenizer is learned once per process.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from r1v3.data.builders import questions
from r1v3.data.encoding import Example, model_image_shape
from r1v3.data.sample import Sample
from r1v3.data.special_tokens import IMAGE_CONTEXT
from r1v3.data.thoughts import THINK_CLOSE
from r1v3.data.tiles import ImageShape
from r1v3.data.tokenizer import render_prompt, train_tokenizer
from r1v3.engine.hf.decoder import HFDecoder
from r1v3.engine.hf.engine import HFEngine
from r1v3.evaluation.policy import Policy
from r1v3.kernels import sample_tokens
from r1v3.model.internvl import build_model, internvl_config
from r1v3.rollout.contract import TokenRules
from r1v3.rollout.local import LocalSampler

IMAGE_SIZE, PATCH_SIZE = 32, 8
TOKENS_PER_TILE = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2
SHAPE = ImageShape(IMAGE_SIZE, 1, TOKENS_PER_TILE)

# What the vocabulary is learned from: among it every word of the monitor as one token.
TEXTS = (
    "I see 34+58. Wait, the first is 84. Ones: 4+8=12. Tens: 8+5+1=14. So 142.",
    "I see 12, 70, 35. Hmm, the second is 76 or 70. It is 70. The largest is 70 in row 2.",
    "So 92. Alternatively, 92-58=34, it fits. Which row shows the smallest number? That is B.",
    f"You are a helpful assistant. system user assistant <think>\n{THINK_CLOSE}\n\n\\boxed{{12}}",
    # Here the marks of the closing tag merge with their neighbors.
    f"So 3. {THINK_CLOSE}\n\nIt is 3.{THINK_CLOSE}",
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of a few hundred tokens."""
    return train_tokenizer(TEXTS * 8, 420)


def model(seed: int = 0, *, kv_heads: int = 2) -> InternVLForConditionalGeneration:
    """Two layers of width 32 on either side, float32, in evaluation mode."""
    words = tokenizer()
    config = internvl_config(
        vocab_size=len(words),
        image_token_id=words.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        },
        text={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
        },
        rope_theta=1e4,
    )
    return build_model(config, seed).eval()


def sharpen(net: InternVLForConditionalGeneration, factor: float = 8.0) -> None:
    """Scale the head, so that the distributions of a random model are far from uniform."""
    with torch.no_grad():
        net.lm_head.weight.mul_(factor)


def draws_of(script: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`sample_tokens` that draws the same next token of the script in every row, unless forced."""
    given = iter(script)

    def sample(
        logits: Tensor, uniforms: Tensor, *, forced: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if forced is None:
            forced = torch.full_like(uniforms, -1, dtype=torch.int64)
        forced = torch.where(forced >= 0, forced, next(given))
        return sample_tokens(logits, uniforms, forced=forced, **options)

    return sample


def an_example(seed: int, *, tiles: int = 1, words: int = 3, response: int = 0) -> Example:
    """A prompt of random words with `tiles` random pictures, and a random response."""
    rng = np.random.default_rng(seed)
    texts = " ".join(str(rng.choice(TEXTS[0].split())) for _ in range(words))
    prompt = render_prompt(
        tokenizer(),
        [{"role": "user", "content": "<image>" * tiles + "\n" + texts}],
        [TOKENS_PER_TILE] * tiles,
    )
    pictures = rng.integers(0, 256, (tiles, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    ids = tuple(int(i) for i in rng.integers(20, len(tokenizer()), response))
    return Example(tuple(prompt), pictures, ids)


def some_questions(count: int) -> list[Sample]:
    """Questions with real pictures, of three domains in turn."""
    return questions("test", ("arithmetic", "comparison", "counting"), count, 3)


def save(folder: Path, seed: int = 0) -> Path:
    """A model folder of `model(seed)` with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    net = model(seed)
    sharpen(net, 5.0)
    HFEngine(net, tokenizer(), modules={}).save(folder)
    return folder


def policy(net: InternVLForConditionalGeneration) -> Policy:
    """A model that answers samples."""
    sampler = LocalSampler(HFDecoder(net), TokenRules.of(tokenizer()))
    return Policy(sampler, tokenizer(), model_image_shape(net.config, 1))
