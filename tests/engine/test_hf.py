"""HFEngine against transformers' plain forward over whole sequences, one at a time."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import InternVLForConditionalGeneration

from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate
from r1v3.engine.head import Head
from r1v3.engine.hf.engine import HFEngine, response_hidden
from r1v3.model.internvl import load_model
from r1v3.model.parts import PARTS, part_of
from tests import tiny

ALL = dict.fromkeys(PARTS, True)
# (tiles and words of each prompt, lengths of the responses): images, text alone, left padding.
CASES = {
    "one": ([(1, 3)], [4]),
    "padded": ([(1, 7), (0, 1), (2, 3)], [3, 6, 1]),
    "group": ([(1, 2)], [5, 2, 0, 1]),
    "groups": ([(1, 6), (0, 2)], [4, 1, 3, 5, 2, 2]),
    "single tokens": ([(1, 1), (1, 4)], [1, 1]),
}


def an_engine(seed: int = 0, **settings: object) -> HFEngine:
    net = tiny.model(seed)
    tiny.sharpen(net)
    return HFEngine(net, tiny.tokenizer(), **{"modules": ALL, **settings})  # type: ignore[arg-type]


def a_batch(case: str) -> Batch:
    prompts, lengths = CASES[case]
    examples: list[Example] = [
        tiny.an_example(i, tiles=tiles, words=words) for i, (tiles, words) in enumerate(prompts)
    ]
    responses = [tiny.an_example(90 + i, response=n).response_ids for i, n in enumerate(lengths)]
    return collate(examples, 0, responses=responses, group_size=len(lengths) // len(prompts))


def in_double(batch: Batch) -> Batch:
    pixels = batch.pixel_values
    return replace(batch, pixels=None if pixels is None else pixels.double())


def plain(
    net: InternVLForConditionalGeneration, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [P * G, R] from full forwards of single, unpadded sequences."""
    logprobs = [[torch.zeros((), dtype=torch.float64)] * batch.response_ids.shape[1]]
    logprobs = [list(logprobs[0]) for _ in batch.response_ids]
    entropy = [list(row) for row in logprobs]
    edges = [0, *batch.tiles.cumsum(0).tolist()]
    for row in range(len(batch.response_ids)):
        p = row // batch.group_size
        prompt = batch.prompt_ids[p][batch.prompt_mask[p]]
        response = batch.response_ids[row][batch.loss_mask[row]]
        pixels = None
        if batch.pixel_values is not None and edges[p + 1] > edges[p]:
            pixels = batch.pixel_values[edges[p] : edges[p + 1]]
        output = net(input_ids=torch.cat([prompt, response])[None], pixel_values=pixels)
        logits = output.logits[0, len(prompt) - 1 : -1].double() / temperature
        log_p = torch.log_softmax(logits, -1)
        for t, token in enumerate(response.tolist()):
            logprobs[row][t] = log_p[t, token]
            entropy[row][t] = -(log_p[t].exp() * log_p[t]).sum()
    stack = [torch.stack([torch.stack(row) for row in rows]) for rows in (logprobs, entropy)]
    return stack[0], stack[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_are_those_of_a_plain_forward(case: str, temperature: float) -> None:
    engine, batch = an_engine(temperature=temperature), a_batch(case)
    with torch.no_grad():
        logprobs, entropy = engine.head(batch).logprobs_and_entropy()
        wanted, wanted_entropy = plain(engine.model, batch, temperature)
    assert logprobs.shape == batch.response_ids.shape and logprobs.dtype == torch.float32
    assert (logprobs - wanted).abs().max() < 1e-5
    assert (entropy - wanted_entropy).abs().max() < 1e-5
    assert (logprobs[~batch.loss_mask] == 0).all() and (entropy[~batch.loss_mask] == 0).all()
    assert (entropy[batch.loss_mask] > 0.05).all()


@pytest.mark.parametrize("case", ["padded", "group", "groups"])
def test_every_gradient_is_that_of_a_plain_forward(case: str) -> None:
    """Shared prompts must pass on the gradients of all their samples, pictures included."""
    engine, batch = an_engine(), in_double(a_batch(case))
    engine.model.double()
    weights = torch.randn(2, *batch.response_ids.shape, dtype=torch.float64)

    def gradients(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        engine.model.zero_grad(set_to_none=True)
        (pair[0] * weights[0] + pair[1] * weights[1]).sum().backward()
        named = engine.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    found, wanted = (
        gradients(engine.head(batch).logprobs_and_entropy()),
        gradients(plain(engine.model, batch)),
    )
    assert set(found) == set(wanted) == {name for name, _ in engine.model.named_parameters()}
    for name, gradient in wanted.items():
        # A key's bias shifts all scores of a row alike: its true gradient is zero.
        scale = 1e-3 + float(gradient.abs().max())
        assert float((found[name] - gradient).abs().max()) < 1e-5 * scale, name
        assert float(gradient.abs().max()) > 0, name


def test_padding_does_not_change_a_row() -> None:
    engine, batch = an_engine(), a_batch("padded")
    with torch.no_grad():
        whole, _ = engine.head(batch).logprobs_and_entropy()
        for i in range(3):
            alone, _ = engine.head(batch.slice(i, i + 1)).logprobs_and_entropy()
            assert (whole[i, : alone.shape[1]] - alone[0]).abs().max() < 1e-5


def test_responses_without_tokens_do_not_break_a_batch() -> None:
    """A stopped-at-once completion has no length to attend over."""
    engine, batch = an_engine(), a_batch("group")
    empty = replace(batch, response_ids=batch.response_ids[:, :0], loss_mask=batch.loss_mask[:, :0])
    logprobs, entropy = engine.head(empty).logprobs_and_entropy()
    assert logprobs.shape == entropy.shape == (4, 0)


def test_an_image_token_inside_a_response_is_text() -> None:
    """Its embedding would otherwise be looked for among the picture's features."""
    engine, batch = an_engine(), a_batch("one")
    image = int(engine.model.config.image_token_id)
    with_token = replace(batch, response_ids=batch.response_ids.clone())
    with_token.response_ids[0, 1] = image
    with torch.no_grad():
        first, second = (
            engine.head(batch).logprobs_and_entropy()[0],
            engine.head(with_token).logprobs_and_entropy()[0],
        )
    assert second.isfinite().all()
    assert torch.allclose(first[0, 0], second[0, 0])


def nll(total: int) -> object:
    return lambda head, index: (-head.logprobs_and_entropy()[0].sum() / total, {})


def steps(engine: HFEngine, batches: Sequence[Batch], **kwargs: float) -> dict[str, float]:
    total = sum(int(b.loss_mask.sum()) for b in batches)
    metrics, _ = engine.train_step(
        batches,
        nll(total),  # type: ignore[arg-type]
        learning_rate=kwargs.get("learning_rate", 1e-3),
    )
    return metrics


def weights_of(engine: HFEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.export_hf()}


def test_micro_batches_change_nothing() -> None:
    batch = a_batch("groups")
    pieces = [[batch], [batch.slice(0, 1), batch.slice(1, 2)]]
    engines = [an_engine(), an_engine()]
    results = [steps(engine, list(p)) for engine, p in zip(engines, pieces, strict=True)]
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("pieces", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole(pieces: int) -> None:
    """Compared before AdamW, which would blow the rounding of tiny gradients up to a step."""
    batch, engine = in_double(a_batch("groups")), an_engine(max_grad_norm=1e9)
    engine.model.double()
    seen: dict[str, Tensor] = {}
    step = engine.optimizer.step

    def keep(*args: object, **kwargs: object) -> object:
        seen.update({n: p.grad.clone() for n, p in engine.trainable.items() if p.grad is not None})
        return step()

    engine.optimizer.step = keep  # type: ignore[method-assign]
    steps(engine, [batch] if pieces == 1 else [batch.slice(0, 1), batch.slice(1, 2)])
    other = an_engine()
    other.model.double()
    logprobs, _ = plain(other.model, batch)
    (-logprobs.sum() / int(batch.loss_mask.sum())).backward()
    for name, parameter in other.model.named_parameters():
        assert parameter.grad is not None
        assert (seen[name] - parameter.grad).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    "trained", [("connector",), ("vision",), ("llm",), ("vision", "llm"), PARTS]
)
def test_exactly_the_named_parts_are_trained(trained: tuple[str, ...]) -> None:
    engine = an_engine(modules={part: part in trained for part in PARTS}, weight_decay=0.1)
    before = weights_of(engine)
    result = steps(engine, [a_batch("padded")])
    moved: dict[str, list[bool]] = {part: [] for part in PARTS}
    for name, tensor in engine.export_hf():
        moved[part_of(name)].append(not torch.equal(tensor, before[name]))
    for part in PARTS:
        if part in trained:
            assert all(moved[part]) and result[f"grad_norm_{part}"] > 0
        else:
            assert not any(moved[part]) and result[f"grad_norm_{part}"] == 0


def test_a_micro_batch_without_pictures_does_not_stop_the_connector() -> None:
    """Its loss has no gradient at all; the step is that of the other micro-batches."""
    batch, modules = a_batch("groups"), {"vision": False, "llm": False}
    engine, other = an_engine(modules=modules), an_engine(modules=modules)
    found = steps(engine, [batch.slice(0, 1), batch.slice(1, 2)])
    assert found["loss"] == pytest.approx(steps(other, [batch])["loss"], rel=1e-5)
    assert found["grad_norm"] > 0
    for (name, one), (_, two) in zip(engine.export_hf(), other.export_hf(), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name


def test_modules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"modules names \['audio'\]"):
        an_engine(modules={"audio": True})
    with pytest.raises(ValueError, match="nothing is left to train"):
        an_engine(modules=dict.fromkeys(PARTS, False))


def test_gradient_norms_per_part_are_those_of_the_gradients() -> None:
    engine, batch = an_engine(), a_batch("padded")
    found = steps(engine, [batch])
    other = an_engine()
    logprobs, _ = plain(other.model, batch)
    loss = -logprobs.sum() / int(batch.loss_mask.sum())
    loss.backward()
    squares = dict.fromkeys(PARTS, 0.0)
    for name, parameter in other.model.named_parameters():
        assert parameter.grad is not None
        squares[part_of(name)] += float(parameter.grad.double().square().sum())
    for part in PARTS:
        assert found[f"grad_norm_{part}"] == pytest.approx(squares[part] ** 0.5, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_a_step_is_adamws_on_the_clipped_gradient() -> None:
    """Matrices decay and vectors do not; gradients are scaled to the greatest norm together."""
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.05, "betas": (0.8, 0.9)}
    engine, other, batch = an_engine(**settings), an_engine(), a_batch("group")
    norm = steps(engine, [batch], learning_rate=2e-3)["grad_norm"]
    assert norm > 0.05
    logprobs, _ = plain(other.model, batch)
    (-logprobs.sum() / int(batch.loss_mask.sum())).backward()
    found = weights_of(engine)
    for name, parameter in other.model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad * 0.05 / norm
        decay = 0.1 if parameter.dim() >= 2 else 0.0
        # The first step of AdamW: both moments are unbiased estimates of this one gradient.
        wanted = parameter * (1 - 2e-3 * decay) - 2e-3 * gradient / (gradient.abs() + 1e-8)
        certain = gradient.abs() > 1e-6
        assert (found[name] - wanted)[certain].abs().max() < 5e-5, name


@pytest.mark.parametrize(("greatest", "wanted"), [(0.05, 0.05), (1e9, None)])
def test_the_optimizer_sees_gradients_of_the_greatest_norm_or_less(
    greatest: float, wanted: float | None
) -> None:
    """AdamW's first step does not tell: it is the same for a gradient of any scale."""
    engine = an_engine(max_grad_norm=greatest)
    seen: list[Tensor] = []
    step = engine.optimizer.step

    def keep(*args: object, **kwargs: object) -> object:
        seen.extend(p.grad.clone() for p in engine.trainable.values() if p.grad is not None)
        return step()

    engine.optimizer.step = keep  # type: ignore[method-assign]
    norm = steps(engine, [a_batch("group")])["grad_norm"]
    total = float(torch.stack([g.double().square().sum() for g in seen]).sum().sqrt())
    assert norm > 0.05
    assert total == pytest.approx(wanted or norm, rel=1e-4)


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    engine, batch = an_engine(weight_decay=0.1), a_batch("one")
    before = weights_of(engine)
    for bad in (float("nan"), float("inf")):
        metrics, _ = engine.train_step(
            [batch],
            lambda head, i, bad=bad: (head.logprobs_and_entropy()[0].sum() * bad, {}),
            learning_rate=1e-3,
        )
        assert not math.isfinite(metrics["grad_norm"])
        assert all(torch.equal(before[name], tensor) for name, tensor in engine.export_hf())
    clean = an_engine(weight_decay=0.1)
    again, first = steps(engine, [batch]), steps(clean, [batch])
    assert again == first  # nothing of the refused step is left in gradients or moments
    assert all(torch.equal(weights_of(clean)[n], t) for n, t in engine.export_hf())


def test_the_loss_function_is_told_which_micro_batch_it_has() -> None:
    engine, batch = an_engine(), a_batch("groups")
    seen = []

    def loss(head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = head.logprobs_and_entropy()
        seen.append((index, tuple(logprobs.shape), tuple(entropy.shape)))
        return logprobs.sum(), {"index": torch.tensor(index)}

    _, outputs = engine.train_step([batch.slice(0, 1), batch.slice(1, 2)], loss, learning_rate=0.0)
    assert [int(output["index"]) for output in outputs] == [0, 1]
    assert seen == [(0, (3, 4), (3, 4)), (1, (3, 5), (3, 5))]


def test_training_lowers_the_loss_on_what_it_is_trained_on() -> None:
    engine, batch = an_engine(), a_batch("padded")
    losses = [steps(engine, [batch], learning_rate=3e-3)["loss"] for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]


def test_saved_weights_load_bit_for_bit_here_and_in_transformers(tmp_path: Path) -> None:
    engine = an_engine()
    steps(engine, [a_batch("one")])
    engine.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "internvl"
    assert (tmp_path / "tokenizer.json").is_file()
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    state = dict(theirs.named_parameters())
    assert {name for name, _ in engine.export_hf()} == set(state)
    ours = dict(load_model(tmp_path).named_parameters())
    fresh = an_engine(7)
    fresh.load_weights(tmp_path)
    for name, tensor in engine.export_hf():
        assert torch.equal(tensor, state[name]) and torch.equal(tensor, ours[name])
    assert all(torch.equal(weights_of(fresh)[n], t) for n, t in engine.export_hf())
    batch = a_batch("groups")
    with torch.no_grad():
        wanted, _ = plain(theirs.eval(), batch)
        assert (fresh.head(batch).logprobs_and_entropy()[0] - wanted).abs().max() < 1e-5


def test_exported_tensors_are_not_part_of_the_graph() -> None:
    assert not any(tensor.requires_grad for _, tensor in an_engine().export_hf())


@torch.no_grad()
def test_lengths_are_asked_for_at_once() -> None:
    """Fails if the forward waits for the device once per 16 responses."""
    net = tiny.model()

    def waits(responses: int) -> int:
        texts = [tiny.an_example(i, response=1 + i % 3).response_ids for i in range(responses)]
        prompt = tiny.an_example(0, tiles=0, words=2)
        batch = collate([prompt], 0, responses=texts, group_size=responses)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            hidden = response_hidden(net, batch)
        assert hidden.shape[:2] == (responses, 3)
        return sum(x.count for x in seen.key_averages() if x.key == "aten::_local_scalar_dense")

    assert waits(34) == waits(66) == waits(98)
