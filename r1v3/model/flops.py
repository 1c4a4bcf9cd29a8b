"""Parameters and floating-point operations of an InternVL, as formulas.

The cluster plan and the telemetry of a running job both count from here. A multiply-add is two
operations. Norms, activations, rotations and the softmax are left out, as is usual for MFU: at
the 38B's sizes they are below 1 % of the total.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import InternVLConfig

from r1v3.data.batch import Batch
from r1v3.model.parts import PARTS


@dataclass(frozen=True)
class Dimensions:
    """The numbers of an InternVL that its cost depends on.

    patches: of one tile, without the class token. image_tokens: of one tile, after the pixel
    shuffle. positions: of the longest sequence. `*_bias` and `layer_norm` concern the vision tower.
    """

    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_ffn: int
    vision_bias: bool
    qk_norm: bool
    layer_norm: bool
    patches: int
    patch_pixels: int
    image_tokens: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    tied: bool

    @classmethod
    def of(cls, config: InternVLConfig) -> "Dimensions":
        """The dimensions of a transformers configuration."""
        vision: Any = config.vision_config
        text: Any = config.text_config
        rows, columns = (
            size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return cls(
            vision_layers=vision.num_hidden_layers,
            vision_hidden=vision.hidden_size,
            vision_heads=vision.num_attention_heads,
            vision_ffn=vision.intermediate_size,
            vision_bias=bool(vision.attention_bias),
            qk_norm=bool(vision.use_qk_norm),
            layer_norm=vision.norm_type == "layer_norm",
            patches=rows * columns,
            patch_pixels=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
            image_tokens=int(rows * columns * config.downsample_ratio**2),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            ffn=text.intermediate_size,
            vocab=text.vocab_size,
            positions=text.max_position_embeddings,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def connector_in(self) -> int:
        """Width of a pixel-shuffled image token."""
        return self.vision_hidden * self.patches // self.image_tokens

    @property
    def vision_layer_matrices(self) -> int:
        """Weights of the matrices of one vision layer."""
        return 4 * self.vision_hidden**2 + 2 * self.vision_hidden * self.vision_ffn

    @property
    def layer_matrices(self) -> int:
        """Weights of the matrices of one language layer."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.ffn

    @property
    def vision_layer(self) -> int:
        """Parameters of one vision layer."""
        h, norm = self.vision_hidden, 2 if self.layer_norm else 1
        vectors = 2 * norm * h + 2 * h + 2 * h + self.vision_ffn  # norms, scales, biases
        vectors += 2 * h if self.qk_norm else 0
        vectors += 3 * h if self.vision_bias else 0
        return self.vision_layer_matrices + vectors

    @property
    def vision_embeddings(self) -> int:
        """Parameters of patch projection, class token and positions."""
        return self.vision_hidden * (self.patch_pixels + 1 + 1 + self.patches + 1)

    @property
    def connector(self) -> int:
        """Parameters of the connector: LayerNorm and two biased linear layers."""
        wide, h = self.connector_in, self.hidden
        return 2 * wide + (wide + 1) * h + (h + 1) * h

    @property
    def layer(self) -> int:
        """Parameters of one language layer."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layer_matrices + bias + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the word embedding, and of the head."""
        return self.vocab * self.hidden

    def parameters(self) -> dict[str, int]:
        """Parameters of each part of the whole model; a tied head counts once."""
        return {
            "vision": self.vision_embeddings + self.vision_layers * self.vision_layer,
            "connector": self.connector,
            "llm": self.layers * self.layer
            + self.hidden
            + self.embedding * (1 if self.tied else 2),
        }


@dataclass(frozen=True)
class Work:
    """The tokens and tiles that pass through the model in one or more micro-batches.

    tokens: positions of the language model; a prompt shared by G responses counts once.
    attended: keys that those positions attend to, summed. labels: rows of the head. tiles: of
    the pictures, each encoded once. samples: responses.
    """

    tokens: int = 0
    attended: int = 0
    labels: int = 0
    tiles: int = 0
    samples: int = 0

    @classmethod
    def of(
        cls, prompts: Sequence[int], responses: Sequence[int], labels: int, tiles: int
    ) -> "Work":
        """Of P prompts with G responses each, response p * G + g answering prompt p.

        Args:
            prompts: tokens of each prompt.
            responses: tokens of each response up to the last one that counts. The last one is
                predicted and never an input.
            labels: response tokens that count.
            tiles: of all prompts.

        Raises:
            ValueError: the responses do not divide evenly among the prompts.
        """
        if not prompts or len(responses) % len(prompts):
            raise ValueError(f"{len(responses)} responses cannot belong to {len(prompts)} prompts")
        group = len(responses) // len(prompts)
        tokens = attended = 0
        for length in prompts:
            tokens += length
            attended += length * (length + 1) // 2
        for index, length in enumerate(responses):
            inputs = max(0, length - 1)
            tokens += inputs
            attended += inputs * prompts[index // group] + inputs * (inputs + 1) // 2
        return cls(tokens, attended, labels, tiles, len(responses))

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.labels + other.labels,
            self.tiles + other.tiles,
            self.samples + other.samples,
        )

    def __mul__(self, count: int) -> "Work":
        return Work(
            self.tokens * count,
            self.attended * count,
            self.labels * count,
            self.tiles * count,
            self.samples * count,
        )


def work_of(batch: Batch) -> Work:
    """Return the work of a micro-batch: prompts once, responses to the last counted token."""
    mask = batch.loss_mask
    lengths = (batch.input_lengths() + mask.any(1)).tolist()  # with the one that is predicted
    return Work.of(
        batch.prompt_mask.sum(1).tolist(),
        lengths,
        int(mask.sum()),
        int(batch.tiles.sum()),
    )


@dataclass(frozen=True)
class Flops:
    """Operations of one pass: of matrices of weights, and of attention, which has no weights."""

    matrices: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.matrices + self.attention

    def times(self, matrices: float, attention: float) -> "Flops":
        """Each multiplied by a factor of its own."""
        return Flops(self.matrices * matrices, self.attention * attention)


def patches_forward(dims: Dimensions, tiles: int) -> Flops:
    """The projection of the patches of `tiles` tiles."""
    return Flops(2.0 * tiles * dims.patches * dims.patch_pixels * dims.vision_hidden)


def vision_forward(dims: Dimensions, tiles: int) -> Flops:
    """The vision layers on `tiles` tiles: all patches of a tile and its class token see another."""
    tokens = dims.patches + 1
    matrices = 2.0 * tiles * tokens * dims.vision_layers * dims.vision_layer_matrices
    return Flops(matrices, 4.0 * tiles * dims.vision_layers * tokens**2 * dims.vision_hidden)


def connector_forward(dims: Dimensions, tiles: int) -> Flops:
    """The connector on the image tokens of `tiles` tiles."""
    weights = dims.connector_in * dims.hidden + dims.hidden**2
    return Flops(2.0 * tiles * dims.image_tokens * weights)


def layers_forward(dims: Dimensions, work: Work, layers: int | None = None) -> Flops:
    """`layers` language layers (default: all), causal attention counted exactly."""
    count = dims.layers if layers is None else layers
    attention = 4.0 * count * work.attended * dims.heads * dims.head_dim
    return Flops(2.0 * count * work.tokens * dims.layer_matrices, attention)


def head_forward(dims: Dimensions, labels: int) -> Flops:
    """The head on the rows that predict a counted token."""
    return Flops(2.0 * labels * dims.embedding)


def forward_flops(dims: Dimensions, work: Work) -> dict[str, float]:
    """Operations of one forward: of each part, the head within llm."""
    llm = layers_forward(dims, work).total + head_forward(dims, work.labels).total
    return {
        "vision": vision_forward(dims, work.tiles).total + patches_forward(dims, work.tiles).total,
        "connector": connector_forward(dims, work.tiles).total,
        "llm": llm,
    }


def train_flops(
    dims: Dimensions, work: Work, modules: Mapping[str, bool], *, recompute: bool = False
) -> dict[str, float]:
    """Operations of forward and backward of each part, with frozen parts counted as they run.

    A trained matrix costs its forward three times (outputs, gradient of its input, gradient of
    its weights), a frozen one that gradients pass through twice, one below everything trained
    once.

    Args:
        modules: which of vision, connector and llm are trained.
        recompute: also count what is computed again in the backward: the layers that gradients
            pass through, and the fused head. Leave it out for MFU.
    """
    vision, connector, llm = (bool(modules.get(part, True)) for part in PARTS)
    again = float(recompute)

    def cost(forward: Flops, trained: bool, passes: bool, extra: float) -> float:
        if not (trained or passes):
            return forward.total
        weights = 1 + float(passes) + float(trained) + extra
        return forward.times(weights, 3 + extra).total

    any_trained = vision or connector or llm
    return {
        # Pixels need no gradient.
        "vision": cost(vision_forward(dims, work.tiles), vision, vision, again)
        + cost(patches_forward(dims, work.tiles), vision, False, 0.0),
        # The norm below the connector's first matrix is trained with it.
        "connector": cost(connector_forward(dims, work.tiles), connector, connector or vision, 0.0),
        "llm": cost(layers_forward(dims, work), llm, any_trained, again)
        + cost(head_forward(dims, work.labels), llm, any_trained, again),
    }


def decode_flops(dims: Dimensions, prompt: int, responses: Sequence[int]) -> float:
    """Operations of sampling `responses` (token counts) after a prompt whose keys are cached."""
    tokens = sum(responses)
    attended = sum(n * prompt + n * (n + 1) // 2 for n in responses)
    work = Work(tokens=tokens, attended=attended)
    return layers_forward(dims, work).total + head_forward(dims, tokens).total
