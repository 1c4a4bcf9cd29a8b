"""prime-rl's own head and loss interface, from its source, against r1v3's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .comparing import assert_close, assert_same, results
from .trainers import prime_rl

lm_head = prime_rl()
from prime_rl.trainer.rl import loss as stock  # noqa: E402

from r1v3.integrations.prime_rl import policy_loss, use_head  # noqa: E402

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 12, 16, 300


@pytest.mark.parametrize("temperature", ["one", "rows", "tokens"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_head_equals_stock(chunk: int, temperature: str) -> None:
    """Fails if a log-probability, entropy or gradient of prime-rl changes with r1v3's head."""
    head = lm_head.FusedOutputLinear(WIDTH, VOCABULARY, chunk)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    temperatures = {
        "one": torch.ones(ROWS, LENGTH),
        "rows": torch.tensor([[0.7], [1.3]]).expand(ROWS, LENGTH),
        "tokens": torch.rand(ROWS, LENGTH) + 0.5,
    }[temperature]

    def run(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        del head.weight
        head.weight = weight
        out = head(hidden, labels, temperature=temperatures)
        return [out["logprobs"], out["entropy"].detach()]

    del head._parameters["weight"]
    head.weight = torch.empty(0)
    leaves = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(VOCABULARY, WIDTH)
    wanted = results(run, *leaves)
    with use_head() as rebound:
        assert len(rebound.names) == 1
        assert_close(wanted, results(run, *leaves))


def test_a_whole_model_with_the_injected_head() -> None:
    """Fails if prime-rl's forward of a model calls the head otherwise than it is called alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    lm_head.inject_prime_lm_head(model, chunk_size=8)
    ids = torch.randint(0, VOCABULARY, (1, 20))
    arguments = {"labels": ids.roll(-1, 1), "temperature": torch.rand(1, 20) + 0.5}
    found = []
    for head in (None, use_head):
        rebound = head() if head else None
        model.zero_grad()
        out = model(input_ids=ids, **arguments)
        out["logprobs"].sum().backward()
        gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
        found.append([out["logprobs"].double(), out["entropy"].double(), *gradients])
        if rebound:
            rebound.undo()
    assert_close(*found)


def test_missing_arguments_are_one_sentence() -> None:
    """Fails if a model that is called without labels ends in an error of the kernels."""
    head = lm_head.FusedOutputLinear(4, 9, 2)
    with use_head(), pytest.raises(ValueError, match="needs labels and a temperature"):
        head(torch.zeros(1, 2, 4))


def sample(length: int) -> dict[str, Any]:
    old = -torch.rand(length)
    return {
        "new": old + torch.randn(length) * 0.5, "old": old, "advantages": torch.randn(length),
        "mask": torch.rand(length) < 0.8, "ref": old + torch.randn(length) * 0.3,
        "weights": torch.rand(length),
    }  # fmt: skip


def definition(new: torch.Tensor, each: dict[str, Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The loss of one sample by its formula."""
    ratio, a = (new - each["old"]).exp(), each["advantages"]
    clipped = ratio.clamp(1 - kwargs.get("clip_low", 0.2), 1 + kwargs.get("clip_high", 0.2))
    if kwargs.get("ratio_clip") == "cispo":
        loss = -clipped.detach() * a * new
    else:
        loss = -torch.minimum(ratio * a, clipped * a)
    if each["use_weights"]:
        loss = loss * each["weights"]
    if kwargs.get("kl_coef"):
        g = each["ref"] - new
        loss = loss + kwargs["kl_coef"] * (g.exp() - g - 1)
    return loss[each["mask"]].sum()


@pytest.mark.parametrize(
    ("kwargs", "weighted"),
    [
        ({}, False),
        ({"clip_low": 0.2, "clip_high": 0.28}, True),
        ({"ratio_clip": "cispo", "clip_low": 1.0, "clip_high": 4.0}, False),
        ({"kl_coef": 0.05}, False),
    ],
)
def test_the_loss_through_prime_rls_own_sum(kwargs: dict[str, Any], weighted: bool) -> None:
    """Fails if samples of different lengths are weighted otherwise than by prime-rl's losses."""
    samples = [{**sample(n), "use_weights": weighted} for n in (9, 1, 14)]
    samples[1]["mask"][:] = True
    function = stock.setup_rl_loss_fn(SimpleNamespace(import_path="", kwargs=kwargs))
    lengths = [9, 1, 14]

    def run(flat: torch.Tensor) -> list[torch.Tensor]:
        loss, metrics = stock.compute_loss(
            list(flat.split(lengths)), [s["old"] for s in samples], [s["ref"] for s in samples],
            [s["advantages"] for s in samples], [s["mask"] for s in samples],
            [s["weights"] for s in samples] if weighted else None, None, None, function, 24, 1, 1,
        )  # fmt: skip
        assert metrics["approx_kl"].shape == (3,)
        return [loss]

    def wanted(flat: torch.Tensor) -> list[torch.Tensor]:
        parts = zip(flat.split(lengths), samples, strict=True)
        return [sum(definition(new, each, kwargs) for new, each in parts) / 24]

    assert_same(wanted, run, torch.cat([s["new"] for s in samples]))


def test_a_kl_that_cannot_be_weighted_is_refused() -> None:
    """Fails if the KL of a weighted sample is added without its weights."""
    each = sample(4)
    inputs = stock.LossInputs(
        each["new"], each["old"], each["ref"], each["advantages"], each["mask"], each["weights"]
    )
    with pytest.raises(ValueError, match="kl_coef needs ref_logprobs"):
        policy_loss(inputs, kl_coef=0.1)
