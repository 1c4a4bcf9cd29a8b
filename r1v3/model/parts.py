"""The three parts of the model, which are trained or frozen as a whole."""

from collections.abc import Mapping

PARTS = ("vision", "connector", "llm")
_PREFIXES = {
    # transformers' InternVLForConditionalGeneration
    "model.vision_tower.": "vision",
    "model.multi_modal_projector.": "connector",
    "model.language_model.": "llm",
    "lm_head.": "llm",
    # r1v3.model.megatron.internvl.InternVL
    "vision_model.": "vision",
    "vision_projection.": "connector",
    "language_model.": "llm",
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, in transformers' names or those of megatron-core.

    Raises:
        ValueError: no part has parameters of this name.
    """
    inner = name.removeprefix("module.")  # megatron-core's wrapper for data parallelism
    for prefix, part in _PREFIXES.items():
        if inner.startswith(prefix):
            return part
    raise ValueError(f"parameter {name!r} belongs to no part of InternVL ({', '.join(PARTS)})")


def check_modules(modules: Mapping[str, bool] | None) -> dict[str, bool]:
    """Whether each part of the model is trained; parts that are not named are, None trains none.

    Raises:
        ValueError: an unknown part, or no part left to train.
    """
    if modules is None:
        return dict.fromkeys(PARTS, False)
    if unknown := set(modules) - set(PARTS):
        raise ValueError(f"modules names {sorted(unknown)}; parts are {', '.join(PARTS)}")
    trained = {part: modules.get(part, True) for part in PARTS}
    if not any(trained.values()):
        raise ValueError("modules switches every part off: nothing is left to train")
    return trained
