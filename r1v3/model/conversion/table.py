"""The one table of InternVL's weights: their names, their shapes, and how Megatron lays them out.

A weight of a Megatron model is built from one or several tensors of an HF checkpoint. `RULES` says
for each: its Megatron name, the names of those tensors in `InternVLForConditionalGeneration`
("native") and in the remote code of InternVLChatModel and SkyworkR1VChatModel ("original"), their
shapes, how they are fused, and which dimension tensor parallelism splits. Loading, exporting,
converting on disk, checking shapes and counting parameters all read this table and nothing else.

Native names are spelled in two ways: the parameters of the transformers class are
`model.vision_tower...`, and its `save_pretrained` (5.23, and every published `-hf` checkpoint)
writes `vision_tower...`. `parameter_name` and `saved_name` translate; both are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import InternVLConfig

from r1v3.model.conversion.sizes import Sizes

# How save_pretrained spells the first words of a parameter's name.
_SAVED_PREFIXES = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# Tensors that checkpoints hold beside the weights: buffers that a model computes for itself.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.original_inv_freq", ".position_ids")


def saved_name(parameter: str) -> str:
    """The name under which `save_pretrained` writes an HF-native parameter."""
    for prefix, saved in _SAVED_PREFIXES.items():
        if parameter.startswith(prefix):
            return saved + parameter.removeprefix(prefix)
    return parameter


def parameter_name(stored: str) -> str:
    """The HF-native parameter that a stored native name belongs to; inverse of `saved_name`."""
    for prefix, saved in _SAVED_PREFIXES.items():
        if stored.startswith(saved):
            return prefix + stored.removeprefix(saved)
    return stored


@dataclass(frozen=True)
class Rule:
    """One kind of weight.

    `native` and `original` are names with {} for the layer; `shapes` has one shape per native
    name, as fields of `Sizes`. Several native names with one original name: that tensor is the
    native ones stacked along dimension 0. In Megatron they are interleaved in `units` equal parts
    (a field of Sizes, or "ranks": one part per tensor-parallel rank).
    `split` is the dimension that tensor parallelism divides (None: every rank holds the whole),
    `padded` allows Megatron zeros at the end of it, `when` is the field of Sizes that switches the
    weight on, `layers` the one that counts its layers.
    """

    megatron: str
    native: tuple[str, ...]
    original: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    split: int | None = None
    units: str = "one"
    padded: bool = False
    when: str | None = None
    layers: str | None = None


@dataclass(frozen=True)
class Weight:
    """One weight of one model: a `Rule` with the layer and the sizes filled in.

    `tied` marks the copy of the embedding that Megatron keeps on the last pipeline stage when
    input and output embeddings are one tensor; checkpoints have no tensor of its own for it.
    """

    megatron: str
    native: tuple[str, ...]
    original: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: int | None
    units: int | Literal["ranks"]
    padded: bool
    tied: bool = False

    def original_of(self, part: int) -> tuple[str, int]:
        """The original tensor that holds native part number `part`, and the row it begins at."""
        if len(self.original) == len(self.native):
            return self.original[part], 0
        return self.original[0], sum(shape[0] for shape in self.shapes[:part])


def _linear(
    megatron: str,
    native: str,
    original: str,
    shape: tuple[str, str],
    *,
    parallel: Literal["column", "row"],
    bias: bool = True,
    padded: bool = False,
) -> tuple[Rule, ...]:
    """A matrix [out, in] and its bias [out]; column-parallel splits `out`, row-parallel `in`."""
    column = parallel == "column"
    matrix = Rule(
        f"{megatron}.weight",
        (f"{native}.weight",),
        (f"{original}.weight",),
        (shape,),
        split=0 if column else 1,
        padded=padded,
    )
    if not bias:
        return (matrix,)
    vector = Rule(
        f"{megatron}.bias",
        (f"{native}.bias",),
        (f"{original}.bias",),
        (shape[:1],),
        split=0 if column else None,
    )
    return matrix, vector


def _whole(
    megatron: str, native: str, original: str, *shape: str, when: str | None = None
) -> tuple[Rule]:
    """A tensor that every tensor-parallel rank holds in full."""
    return (Rule(megatron, (native,), (original,), (shape,), when=when),)


def _norm(megatron: str, native: str, original: str, size: str, bias: str) -> tuple[Rule, ...]:
    """A norm with a weight [size], and a bias where the field `bias` of Sizes says so."""
    return (
        *_whole(f"{megatron}.weight", f"{native}.weight", f"{original}.weight", size),
        *_whole(f"{megatron}.bias", f"{native}.bias", f"{original}.bias", size, when=bias),
    )


def _under(
    megatron: str, native: str, original: str, *rules: tuple[Rule, ...], layers: str | None = None
) -> tuple[Rule, ...]:
    """Put prefixes before all names of the rules."""
    return tuple(
        Rule(
            megatron + rule.megatron,
            tuple(native + name for name in rule.native),
            tuple(original + name for name in rule.original),
            rule.shapes,
            rule.split,
            rule.units,
            rule.padded,
            rule.when,
            layers,
        )
        for block in rules
        for rule in block
    )


def _vision_qkv(kind: str, columns: tuple[str, ...], when: str | None) -> tuple[Rule]:
    return (
        Rule(
            f"self_attention.linear_qkv.{kind}",
            tuple(f"attention.{letter}_proj.{kind}" for letter in "qkv"),
            (f"attn.qkv.{kind}",),
            (("vision", *columns),) * 3,
            split=0,
            units="vision_heads",
            padded=True,
            when=when,
        ),
    )


def _vision_qk_norm(letter: str) -> tuple[Rule]:
    return (
        Rule(
            f"self_attention.{letter}_layernorm.weight",
            (f"attention.{letter}_norm.weight",),
            (f"attn.{letter}_norm.weight",),
            (("vision",),),
            split=0,
            padded=True,
            when="vision_qk_norm",
        ),
    )


def _text_qkv(kind: str, *columns: str) -> tuple[Rule]:
    names = tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
    rows = ("text_queries", "text_keys", "text_keys")
    return (
        Rule(
            f"self_attention.linear_qkv.{kind}",
            names,
            names,
            tuple((size, *columns) for size in rows),
            split=0,
            units="text_groups",
        ),
    )


def _gated(megatron: str, *names: str) -> tuple[Rule]:
    return (Rule(megatron, names, names, (("text_ffn", "text"),) * 2, split=0, units="ranks"),)


def _vocabulary(megatron: str, native: str, original: str) -> tuple[Rule]:
    shapes = (("vocabulary", "text"),)
    return (Rule(megatron, (native,), (original,), shapes, split=0, padded=True),)


_EMBEDDING = (
    "language_model.embedding.word_embeddings.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)
_HEAD = ("language_model.output_layer.weight", "lm_head.weight", "language_model.lm_head.weight")

# fmt: off
RULES: tuple[Rule, ...] = (
    *_under(
        "vision_model.", "model.vision_tower.embeddings.", "vision_model.embeddings.",
        _whole("class_token", "cls_token", "class_embedding", "one", "one", "vision"),
        _whole("position_embeddings", "position_embeddings", "position_embedding",
               "one", "vision_positions", "vision"),
        _whole("conv1.weight", "patch_embeddings.projection.weight", "patch_embedding.weight",
               "vision", "channels", "patch_height", "patch_width"),
        _whole("conv1.bias", "patch_embeddings.projection.bias", "patch_embedding.bias", "vision"),
    ),
    *_under(
        "vision_model.decoder.layers.{}.",
        "model.vision_tower.encoder.layer.{}.",
        "vision_model.encoder.layers.{}.",
        _norm("input_layernorm", "layernorm_before", "norm1", "vision", "vision_norm_bias"),
        _vision_qkv("weight", ("vision",), None),
        _vision_qkv("bias", (), "vision_qkv_bias"),
        _vision_qk_norm("q"),
        _vision_qk_norm("k"),
        _linear("self_attention.linear_proj", "attention.projection_layer", "attn.proj",
                ("vision", "vision"), parallel="row", padded=True),
        _whole("ls1", "lambda_1", "ls1", "vision"),
        _norm("pre_mlp_layernorm", "layernorm_after", "norm2", "vision", "vision_norm_bias"),
        _linear("mlp.linear_fc1", "mlp.fc1", "mlp.fc1", ("vision_ffn", "vision"),
                parallel="column"),
        _linear("mlp.linear_fc2", "mlp.fc2", "mlp.fc2", ("vision", "vision_ffn"), parallel="row"),
        _whole("ls2", "lambda_2", "ls2", "vision"),
        layers="vision_layers",
    ),
    *_under(
        "vision_projection.", "model.multi_modal_projector.", "mlp1.",
        _whole("norm.weight", "layer_norm.weight", "0.weight", "shuffled"),
        _whole("norm.bias", "layer_norm.bias", "0.bias", "shuffled"),
        _linear("encoder.linear_fc1", "linear_1", "1", ("text", "shuffled"), parallel="column"),
        _linear("encoder.linear_fc2", "linear_2", "3", ("text", "text"), parallel="row"),
    ),
    *_vocabulary(*_EMBEDDING),
    *_under(
        "language_model.decoder.layers.{}.",
        "model.language_model.layers.{}.",
        "language_model.model.layers.{}.",
        _whole("input_layernorm.weight", "input_layernorm.weight", "input_layernorm.weight",
               "text"),
        _text_qkv("weight", "text"),
        _text_qkv("bias"),
        _linear("self_attention.linear_proj", "self_attn.o_proj", "self_attn.o_proj",
                ("text", "text_queries"), parallel="row", bias=False),
        _whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight",
               "post_attention_layernorm.weight", "text"),
        _gated("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        _linear("mlp.linear_fc2", "mlp.down_proj", "mlp.down_proj", ("text", "text_ffn"),
                parallel="row", bias=False),
        layers="layers",
    ),
    *_whole("language_model.decoder.final_layernorm.weight", "model.language_model.norm.weight",
            "language_model.model.norm.weight", "text"),
    *_vocabulary(*_HEAD),
)
# fmt: on


def weights(config: InternVLConfig) -> list[Weight]:
    """Every weight of a model of this configuration, in the order of its forward pass.

    Raises:
        ValueError: the configuration describes a model that the table does not cover.
    """
    sizes = Sizes.of(config)
    return [weight for run in _runs() for weight in _expand(run, sizes)]


def _runs() -> Iterator[list[Rule]]:
    """Neighboring rules of one block, so that layer 0 comes before layer 1 in all its weights."""
    run: list[Rule] = []
    for rule in RULES:
        if run and rule.layers != run[-1].layers:
            yield run
            run = []
        run.append(rule)
    yield run


def _expand(rules: list[Rule], sizes: Sizes) -> Iterator[Weight]:
    counted = rules[0].layers
    for layer in range(getattr(sizes, counted) if counted else 1):
        for rule in rules:
            if rule.when and not getattr(sizes, rule.when):
                continue
            tied = sizes.tied and rule.megatron == _HEAD[0]
            native, original = (
                ((_EMBEDDING[1],), (_EMBEDDING[2],)) if tied else (rule.native, rule.original)
            )
            yield Weight(
                megatron=rule.megatron.format(layer),
                native=tuple(name.format(layer) for name in native),
                original=tuple(name.format(layer) for name in original),
                shapes=tuple(
                    tuple(getattr(sizes, size) for size in shape) for shape in rule.shapes
                ),
                split=rule.split,
                units="ranks" if rule.units == "ranks" else getattr(sizes, rule.units),
                padded=rule.padded,
                tied=tied,
            )


def native_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `InternVLForConditionalGeneration`, from the table."""
    return {
        name: shape
        for weight in weights(config)
        if not weight.tied
        for name, shape in zip(weight.native, weight.shapes, strict=True)
    }
