"""Bytes that a rank holds, as formulas that follow the modules of `r1v3.model.megatron`.

Saved activations are what autograd keeps: `tests/plan/test_memory.py` counts them in the
real modules and finds the same bytes. What exists only for a moment inside a layer's backward is
estimated by its largest tensors, and the same test sees that no more is needed. Everything is in
bytes; GB is 10^9.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from r1v3.kernels.linear.tiles import GROUP_WORKSPACE
from r1v3.model.flops import Dimensions, Work

# Not measured here; what is usual for a process with NCCL communicators on an 80 GB device.
CUDA_AND_NCCL = 4e9
# What a sleeping vLLM keeps: captured graphs, communicators, its own context.
VLLM_ASLEEP = 2e9
# What vLLM sets aside for activations and graphs besides weights and key-value cache.
VLLM_WORKSPACE = 3e9


@dataclass(frozen=True)
class Pack:
    """A micro-batch at its largest: P prompts of equal length with G responses of equal length.

    tiles: per prompt. The last token of a response is predicted and never an input.
    """

    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int
    tiles: int

    @property
    def responses(self) -> int:
        """P * G."""
        return self.prompts * self.group

    @property
    def keys_each(self) -> int:
        """Keys of one response's segment."""
        return self.prompt_tokens + self.response_tokens - 1

    @property
    def tokens(self) -> int:
        """Rows T of the pack."""
        return self.prompts * self.prompt_tokens + self.responses * (self.response_tokens - 1)

    @property
    def keys(self) -> int:
        """Rows of all segments' keys."""
        return self.prompts * self.prompt_tokens + self.responses * self.keys_each

    @property
    def labels(self) -> int:
        """Response tokens M that count."""
        return self.responses * self.response_tokens

    @property
    def all_tiles(self) -> int:
        """Tiles of all prompts."""
        return self.prompts * self.tiles

    def work(self) -> Work:
        """The same as work to count operations of."""
        return Work.of(
            [self.prompt_tokens] * self.prompts,
            [self.response_tokens] * self.responses,
            self.labels,
            self.all_tiles,
        )


@dataclass(frozen=True)
class Shards:
    """Split of a model, and the precision of its activations.

    layers: language layers of each pipeline stage. element: bytes of weights and activations.
    padded_heads, padded_vocab: of the vision tower and the vocabulary. cuda: fused RMS norm and
    flash attention; without, the CPU's operators, which keep more. context: ranks over which the
    tokens of a micro-batch, its labels and its tiles are divided.
    """

    tensor: int
    sequence: bool
    layers: tuple[int, ...]
    recompute: bool
    element: int
    padded_heads: int
    padded_vocab: int
    cuda: bool = True
    context: int = 1

    @property
    def pipeline(self) -> int:
        """Number of stages."""
        return len(self.layers)

    @property
    def scatter(self) -> int:
        """Over how many ranks the tokens between layers are split."""
        return self.tensor if self.sequence else 1

    def segments(self, pack: Pack) -> list[tuple[int, int, int]]:
        """(rows, keys, how many) of the segments of a context-parallel rank.

        A divided segment is an early and a late chunk, here those of the first rank; the chunks of
        the others have the same rows and keys together.
        """
        inputs = pack.response_tokens - 1
        whole = [
            (pack.prompt_tokens, pack.prompt_tokens, pack.prompts),
            (inputs, pack.keys_each, pack.responses),
        ]
        if self.context == 1:
            return whole
        found = []
        for rows, keys, count in whole:
            chunk = -(-rows // (2 * self.context))
            found += [(chunk, keys - rows + chunk, count), (chunk, keys, count)]
        return found

    def rows(self, pack: Pack) -> int:
        """Rows of a pack that one context-parallel rank runs through the layers."""
        return sum(rows * count for rows, _, count in self.segments(pack))

    def keys(self, pack: Pack) -> int:
        """Rows of all segments' keys on one context-parallel rank."""
        return sum(keys * count for _, keys, count in self.segments(pack))

    def share(self, count: int) -> int:
        """A context-parallel rank's share of labels or tiles."""
        return -(-count // self.context)


def stage_parameters(dims: Dimensions, shards: Shards, stage: int) -> dict[str, int]:
    """Parameters of one rank of a stage by part, padding included."""
    tp, heads = shards.tensor, shards.padded_heads
    first, last = stage == 0, stage == shards.pipeline - 1
    w, size = dims.vision_hidden, dims.vision_hidden // dims.vision_heads
    norm = 2 if dims.layer_norm else 1
    inner = 3 * heads * size * (w + dims.vision_bias) + heads * size * w
    inner += 2 * heads * size * dims.qk_norm + dims.vision_ffn * (2 * w + 1)
    vision_layer = inner // tp + (2 * norm + 4) * w
    wide, h = dims.connector_in, dims.hidden
    connector = 2 * wide + h * (wide + 1) // tp + h * h // tp + h
    attention = (dims.heads + 2 * dims.kv_heads) * dims.head_dim * (
        h + 1
    ) + dims.heads * dims.head_dim * h
    layer = (attention + 3 * h * dims.ffn) // tp + 2 * h
    rows = shards.padded_vocab * h // tp
    tables = (first or (last and dims.tied)) + (last and not dims.tied)
    return {
        "vision": first * (dims.vision_embeddings + dims.vision_layers * vision_layer),
        "connector": first * connector,
        "llm": shards.layers[stage] * layer + rows * tables + last * h,
    }


def norm_saved(shards: Shards, width: int) -> int:
    """Bytes a norm keeps per token, its output apart: its input and a statistic."""
    if shards.cuda:
        return width * shards.element + 4
    # The CPU's RMS norm keeps a float32 input and the normalized value.
    return 2 * width * 4 + 4


def layer_saved(dims: Dimensions, shards: Shards, pack: Pack) -> int:
    """Bytes one language layer keeps for its backward without recomputation."""
    e, tp, t = shards.element, shards.tensor, shards.rows(pack)
    heads = dims.heads // tp * dims.head_dim
    kv = max(dims.kv_heads // tp, 1) * dims.head_dim
    norms = 2 * (norm_saved(shards, dims.hidden) + dims.hidden * e) * (t // shards.scatter)
    rotary = 4 * dims.head_dim * e * t
    attention = (2 * heads * e + 4 * dims.heads // tp) * t + 2 * kv * e * shards.keys(pack)
    gated = 5 * dims.ffn // tp * e * t
    total = norms + rotary + attention + gated
    if not shards.cuda:
        # Outputs of segments before they are joined, and masks that flash attention never makes.
        total += heads * e * t
        total += sum(n * keys * count * e for n, keys, count in shards.segments(pack) if n != keys)
    return total


def vision_layer_saved(dims: Dimensions, shards: Shards, tiles: int) -> int:
    """Bytes one vision layer keeps for its backward without recomputation."""
    e, w = shards.element, dims.vision_hidden
    tokens = tiles * (dims.patches + 1)
    local_heads = shards.padded_heads // shards.tensor
    local = local_heads * (w // dims.vision_heads)
    if dims.layer_norm:
        norm = w * e + 8
    else:
        norm = norm_saved(shards, w)
    per_token = 2 * (norm + w * e) + 2 * w * e  # norms with their outputs; scaled branches
    per_token += 2 * (local * 4 + local * e + 4) + 2 * local * e if dims.qk_norm else 0
    per_token += 3 * local * e + local * e + 4 * local_heads  # qkv, output, log-sum-exp
    per_token += local * e if shards.cuda else 0  # flash-attn's layout is not the projection's
    per_token += 2 * dims.vision_ffn // shards.tensor * e
    return tokens * per_token


def connector_saved(dims: Dimensions, shards: Shards, tiles: int) -> int:
    """Bytes the connector keeps for its backward."""
    e, statistics = shards.element, 8 if shards.cuda else 2 * shards.element
    per_token = 2 * dims.connector_in * e + statistics + 2 * dims.hidden // shards.tensor * e
    return tiles * dims.image_tokens * per_token


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank while it trains.

    kept: of one micro-batch in flight, from its forward to its backward. in_flight: how many.
    layer: the largest moment inside a layer's backward. head: the head's forward and backward
    with the fused head; materialized: with all logits and their gradient in float32. The last
    three happen one at a time.
    """

    kept: float
    in_flight: int
    layer: float
    head: float
    materialized: float

    @property
    def total(self) -> float:
        """At the worst moment, with the fused head."""
        return self.kept * self.in_flight + max(self.layer, self.head)

    @property
    def total_materialized(self) -> float:
        """At the worst moment, with materialized logits."""
        return self.kept * self.in_flight + max(self.layer, self.materialized)


def image_kept(dims: Dimensions, shards: Shards, pack: Pack, modules: Mapping[str, bool]) -> float:
    """Bytes that vision tower and connector keep of a micro-batch in flight."""
    tiles, e = shards.share(pack.all_tiles), shards.element
    if not tiles:
        return 0.0
    total = 0
    if modules["vision"]:
        pixels = dims.patch_pixels * dims.patches * e * tiles
        if shards.recompute:
            inputs = dims.vision_hidden * e * (dims.patches + 1) * tiles
            total += pixels + dims.vision_layers * inputs
        else:
            total += pixels + dims.vision_layers * vision_layer_saved(dims, shards, tiles)
    if modules["vision"] or modules["connector"]:
        total += connector_saved(dims, shards, tiles)
    return float(total)


def layers_kept(dims: Dimensions, shards: Shards, pack: Pack, stage: int) -> float:
    """Bytes that a stage's language layers keep of a micro-batch in flight."""
    t, count = shards.rows(pack), shards.layers[stage]
    rows = dims.hidden * shards.element * (t // shards.scatter)
    total = 4 * dims.head_dim * t  # rotary angles
    if shards.recompute:
        total += count * rows
    else:
        # The list of keys is one tensor for all layers.
        total += count * layer_saved(dims, shards, pack) + 8 * shards.keys(pack)
    if stage == 0 and shards.sequence and count:
        # The first layer's part of the tokens is a view of all of them.
        if shards.recompute:
            total += dims.hidden * shards.element * t - rows
        elif shards.cuda or shards.element == 4:
            total += dims.hidden * shards.element * t - rows
    if stage == shards.pipeline - 1:
        total += norm_saved(shards, dims.hidden) * (t // shards.scatter)
    return float(total)


def head_workspace(
    dims: Dimensions, shards: Shards, pack: Pack, trained: bool
) -> tuple[float, float]:
    """(fused, materialized) bytes of the head's forward and backward on the last stage."""
    e, t, m, h = shards.element, shards.rows(pack), shards.share(pack.labels), dims.hidden
    columns = shards.padded_vocab // shards.tensor
    # All tokens gathered and their gradient; the counted rows, their gradient in both precisions.
    hidden = 2 * t * h * e + m * h * (2 * e + 4)
    weight = columns * h * (4 + e) if trained else 0
    # Without a group the head takes more where that is free.
    chunk = min(GROUP_WORKSPACE, m * columns * (4 + e))
    return float(hidden + weight + chunk), float(hidden + weight + 2 * 4 * m * columns)


def layer_workspace(dims: Dimensions, shards: Shards, pack: Pack) -> float:
    """Bytes at the worst moment of a language layer's backward: what recomputation brings back,
    and gradients within the MLP, or the gathered input and gradient of a full-width product."""
    e, t, h = shards.element, shards.rows(pack), dims.hidden
    gradients = t * e * (2 * max(dims.ffn // shards.tensor, h) + 2 * h // shards.scatter)
    return float(gradients + (layer_saved(dims, shards, pack) if shards.recompute else 0))


def vision_workspace(dims: Dimensions, shards: Shards, tiles: int) -> float:
    """The same for a layer of the vision tower."""
    tokens, e, w = tiles * (dims.patches + 1), shards.element, dims.vision_hidden
    gradients = tokens * e * (2 * max(dims.vision_ffn // shards.tensor, w) + 2 * w)
    again = vision_layer_saved(dims, shards, tiles) if shards.recompute else 0
    return float(gradients + again)


def activations(
    dims: Dimensions,
    shards: Shards,
    pack: Pack,
    stage: int,
    modules: Mapping[str, bool],
    micro_batches: int,
) -> Activations:
    """Memory of a rank of a pipeline stage besides weights, gradients and optimizer.

    Args:
        modules: which of vision, connector and llm are trained.
        micro_batches: of one data-parallel rank in a step; 1F1B keeps at most `pipeline - stage`
            of them in flight.
    """
    kept = layers_kept(dims, shards, pack, stage)
    layer = layer_workspace(dims, shards, pack)
    if stage == 0:
        kept += image_kept(dims, shards, pack, modules)
        if modules["vision"]:
            layer = max(layer, vision_workspace(dims, shards, shards.share(pack.all_tiles)))
    if shards.pipeline > 1:
        # One activation to send and one gradient received.
        layer += 2 * dims.hidden * shards.element * (shards.rows(pack) // shards.scatter)
    fused = materialized = 0.0
    if stage == shards.pipeline - 1:
        fused, materialized = head_workspace(dims, shards, pack, modules["llm"])
    in_flight = max(1, min(shards.pipeline - stage, micro_batches))
    return Activations(kept, in_flight, layer, fused, materialized)


def cache_per_token(dims: Dimensions, shards: Shards, stage: int) -> int:
    """Bytes of keys and values of one token in a stage's layers on one rank."""
    kv = max(dims.kv_heads // shards.tensor, 1) * dims.head_dim
    return 2 * kv * shards.element * shards.layers[stage]


@dataclass(frozen=True)
class State:
    """Bytes that a training rank holds all the time."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, int],
        modules: Mapping[str, bool],
        *,
        element: int,
        data: int,
        distributed: bool,
    ) -> "State":
        """Gradients are summed in float32; Adam has two float32 moments, and a float32 master
        where weights are shorter. Frozen parts have neither.

        Args:
            parameters: of this rank, by part.
            data: data- and context-parallel ranks, over which the distributed optimizer shards its
                state.
        """
        trained = sum(count for part, count in parameters.items() if modules.get(part, False))
        each = 8 if element == 4 else 12
        return cls(
            float(sum(parameters.values()) * element),
            4.0 * trained,
            each * trained / (data if distributed else 1),
        )
