"""One benchmarked training step: the model's size, the tokens, and where both are kept.

Needs neither torch nor transformers, so that the parent of the measuring processes stays small.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from r1v3 import files

HEADS = ("fused", "materialized", "materialized-bf16")
ENGINES = ("megatron", "hf")
TRL = "trl"
VARIANTS = (*(f"{engine}-{head}" for head in HEADS for engine in ENGINES), TRL)
REFERENCE = "reference"
CLIP = 0.2
# Ids below are the tokenizer's special tokens; a random response must not hold an image token.
FIRST_ID = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a random InternVL; `vision` and `text` as `r1v3.model.internvl.internvl_config`."""

    vocab_size: int
    image_size: int
    patch_size: int
    vision: dict[str, int]
    text: dict[str, int]

    @property
    def image_tokens(self) -> int:
        """Tokens of one tile in the prompt, after the pixel shuffle by 2."""
        return (self.image_size // self.patch_size // 2) ** 2


SHAPES = {
    "tiny": Shape(
        1003,
        32,
        8,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 4096,
        },
    ),
    # The 38B's architecture (RMS and QK norm in the vision tower, untied head) in InternVL3-2B's
    # sizes: InternViT-300M and Qwen2.5-1.5B.
    "2b": Shape(
        151_674,
        448,
        14,
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "max_position_embeddings": 32_768,
        },
    ),
}


@dataclass(frozen=True)
class Workload:
    """One training step.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of the matrix products: "float32" or "bfloat16"; master weights, gradients and
            optimizer state are float32 in any case.
        model: of `SHAPES`.
        prompts: micro-batches of the step, one prompt with its group each.
        group: responses to a prompt.
        prompt_tokens: of each prompt, its image tokens included.
        response_tokens: of each response; all of them count.
        tiles: pictures in a prompt.
        repeats: timed steps.
    """

    device: str
    dtype: str
    model: str
    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int
    tiles: int
    repeats: int

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "prompt_tokens", "response_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.tiles < 0:
            raise ValueError(f"tiles is {self.tiles}, it must not be negative")
        text, needed = self.shape.text, self.tiles * self.shape.image_tokens + 1
        if self.prompt_tokens < needed:
            raise ValueError(
                f"prompt_tokens is {self.prompt_tokens}; {self.tiles} tiles of "
                f"{self.shape.image_tokens} image tokens need at least {needed}"
            )
        longest = self.prompt_tokens + self.response_tokens
        if longest > text["max_position_embeddings"]:
            raise ValueError(
                f"prompt and response have {longest} tokens; the {self.model} model takes up to "
                f"{text['max_position_embeddings']}"
            )

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return SHAPES[self.model]

    def write(self, folder: Path) -> None:
        """Keep it for the measuring processes."""
        files.write_json(folder / "workload.json", asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Workload":
        """Read what `write` kept."""
        return cls(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))


# By device: what runs in seconds, and what one GPU of 80 GB holds with its logits materialized.
DEFAULTS = {
    "cpu": Workload("cpu", "float32", "tiny", 2, 4, 24, 16, 1, 5),
    "cuda": Workload("cuda", "bfloat16", "2b", 8, 8, 512, 512, 1, 10),
}
