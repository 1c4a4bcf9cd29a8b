"""Formulas of parameters and operations against transformers' model and torch's own counter."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLConfig, InternVLForConditionalGeneration

from r1v3.data.encoding import collate
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.flops import (
    Dimensions,
    Work,
    decode_flops,
    forward_flops,
    patches_forward,
    train_flops,
)
from r1v3.model.internvl import count_parameters
from tests import tiny

PUBLISHED = Path(__file__).parents[2] / "configs" / "r1v3-38b" / "model"
ALL = {"vision": True, "connector": True, "llm": True}


def test_parameters_of_the_38b_equal_the_tensors_of_transformers_model() -> None:
    """Fails if a bias, norm or scale is missing: the plan would then be of another model."""
    config = InternVLConfig.from_pretrained(PUBLISHED)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    counted = Dimensions.of(config).parameters()
    assert counted == count_parameters(model)
    assert sum(counted.values()) == 38_388_164_992
    assert len(list(model.parameters())) == 1456


def test_parameters_of_another_tower() -> None:
    """Fails if LayerNorm, QKV biases or a missing QK norm are not told apart."""
    config = tiny.model().config
    config.vision_config.update(
        {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False}
    )
    assert Dimensions.of(config).parameters() == count_parameters(
        InternVLForConditionalGeneration(config)
    )


@pytest.mark.parametrize("modules", [ALL, {**ALL, "vision": False}, {**ALL, "llm": False}])
def test_training_flops_equal_what_torch_counts(modules: dict[str, bool]) -> None:
    """Fails if a matrix is left out or a frozen part is counted like a trained one.

    The vision tower and the language model are counted by torch as they run; the reference
    attends to padded and future keys as well, so here `attended` is every key it multiplies.
    """
    examples = [tiny.an_example(1, words=6, response=9), tiny.an_example(1, words=6, response=9)]
    length = len(examples[0].prompt_ids)
    batch = collate(examples, tiny.tokenizer().pad_token_id)
    engine = HFEngine(tiny.model(), tiny.tokenizer(), modules=modules)
    dims = Dimensions.of(engine.model.config)
    work = Work.of([length, length], [9, 9], labels=18, tiles=2)
    assert work.tokens == 2 * (length + 8) and work.samples == 2
    padded = Work(work.tokens, 2 * (length**2 + 8 * (length + 8)), 0, 2, 2)
    # The plain products of attention, because the counter does not know the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logprobs, entropy = engine.head(batch).logprobs_and_entropy()
        (logprobs.sum() + entropy.sum()).backward()
    # The head is one operator to the counter, which does not see the products inside.
    # A frozen embedding saves the gradient of the responses' first queries, which is not modeled.
    slack = 0 if modules["llm"] else 0.01
    counted = counter.get_total_flops()
    assert sum(train_flops(dims, padded, modules).values()) == pytest.approx(counted, rel=slack)
    labeled = sum(train_flops(dims, padded + Work(labels=18), modules).values())
    head = 2 * 18 * dims.vocab * dims.hidden * (3 if modules["llm"] else 2)
    assert labeled - sum(train_flops(dims, padded, modules).values()) == head


def test_a_shared_prompt_is_counted_once() -> None:
    """Fails if G samples of one prompt are credited with running it G times."""
    alone = Work.of([100], [20], 20, 13)
    group = Work.of([100], [20] * 4, 80, 13)
    assert alone.tokens == 119 and alone.attended == 5050 + 19 * 100 + 190
    assert group.tokens == 100 + 4 * 19 and group.tiles == 13
    assert group.attended == 5050 + 4 * (19 * 100 + 190)
    assert alone + alone == alone * 2
    with pytest.raises(ValueError, match="3 responses cannot belong to 2 prompts"):
        Work.of([1, 1], [1, 1, 1], 3, 0)


def test_recomputation_and_decoding() -> None:
    """Fails if recomputation costs other than one more forward of the layers and the head."""
    dims = Dimensions.of(InternVLConfig.from_pretrained(PUBLISHED))
    work = Work.of([3840], [4096], 4096, 13)
    once, plain = forward_flops(dims, work), train_flops(dims, work, ALL)
    again = train_flops(dims, work, ALL, recompute=True)
    patches = patches_forward(dims, 13).total
    added = {part: again[part] - plain[part] for part in plain}
    assert added == {"vision": once["vision"] - patches, "connector": 0, "llm": once["llm"]}
    assert sum(plain.values()) == 3 * sum(once.values()) - patches
    # About two operations per weight and token, and the keys of the prompt on top.
    per_token = decode_flops(dims, 3840, [1])
    weights = dims.layers * dims.layer_matrices + dims.embedding
    assert per_token == 2 * weights + 4 * dims.layers * 3841 * dims.heads * dims.head_dim
