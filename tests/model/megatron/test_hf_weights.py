"""Megatron models in four gloo processes: loaded, trained, exported and saved in all layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from r1v3.model.conversion import native_shapes
from tests.model.conversion.checkpoints import (
    IMAGE_TOKEN_ID,
    parameters_of,
    tiny_config,
    tiny_model,
    write_native,
    write_original,
)
from tests.processes import run_ranks

pytest.importorskip("megatron.core")

RANKS = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files the workers wrote; they run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("parallel")
    net = tiny_model()
    write_native(net, folder / "native")
    broken = tiny_model()
    broken.config.text_config.num_hidden_layers = 2
    del broken.model.language_model.layers[2]
    write_native(broken, folder / "broken")
    write_original(net, folder / "original")
    config = tiny_config()
    config.tie_word_embeddings = True
    tied = tiny_model(config)
    write_native(tied, folder / "tied")
    save_file(parameters_of(tied), folder / "tied.safetensors")
    parameters = parameters_of(net)
    save_file(parameters, folder / "expected.safetensors")
    (folder / "order.json").write_text(json.dumps(list(native_shapes(net.config))))
    save_file(batch(), folder / "batch.safetensors")
    run_ranks("tests.model.megatron.hf_weights_worker", len(RANKS), folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(0, 499, (2, 8), generator=generator)
    prompts[:, 1:5] = IMAGE_TOKEN_ID
    return {
        "prompt_ids": prompts,
        "response_ids": torch.randint(0, 499, (2, 4), generator=generator),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, dict]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in RANKS]


@pytest.mark.parametrize("layout", ["tp2pp2", "tp4", "pp2"])
def test_what_is_loaded_is_exported_bit_for_bit(results: list[dict], layout: str) -> None:
    """Fails if a shard is cut, fused, ordered or put together wrongly at any layout.

    The tiny model has 5 vision heads, 2 KV groups (less than 4 ranks), 3 layers over 2 stages.
    """
    for result in results:
        for check in ("native comes back", "original comes back", "in small buckets", "to one"):
            assert result[layout][check] is True, check


def test_bfloat16_parameters_hold_rounded_values(results: list[dict]) -> None:
    """Fails if a dtype is converted by reinterpreting bits, or exported in another one."""
    assert all(result["tp4"]["in bfloat16"] is True for result in results)


def test_a_tied_head_is_filled_from_the_embedding(results: list[dict]) -> None:
    """Fails if the last stage's copy of the embedding stays unset, or is exported a second time."""
    assert all(result["pp2"]["tied"] is True for result in results)
    assert [result["pp2"].get("tied head") for result in results].count(True) == 2


def test_a_checkpoint_that_does_not_fit_is_reported_by_every_rank(results: list[dict]) -> None:
    """Fails if one rank raises while the others wait, or a failed load leaves half a model."""
    reports = {result["tp2pp2"]["report"] for result in results}
    assert len(reports) == 1
    assert "12 missing, 0 unexpected and 0 misshapen" in reports.pop()
    assert all(result["tp2pp2"]["unchanged by a failure"] for result in results)


def test_a_failed_save_is_raised_on_every_rank(results: list[dict]) -> None:
    """Fails if the first rank's error stays its own, so that the others wait for it or go on."""
    for case in ("folder is a file", "disk is full"):
        assert {result["tp2pp2"][case] for result in results} == {"OSError"}


def test_padding_stays_zero_in_training(results: list[dict]) -> None:
    """Fails if loading leaves garbage in padded heads or rows, or a gradient reaches them."""
    assert all(result["tp2pp2"]["padding"] == 0.0 for result in results)


def test_a_trained_and_saved_model_is_the_same_in_transformers(folder: Path) -> None:
    """Fails if a step at TP2 x PP2 is saved as other weights than those it computed with."""
    loaded, info = InternVLForConditionalGeneration.from_pretrained(
        folder / "trained", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert len(list((folder / "trained").glob("model-*.safetensors"))) > 5
    before = load_file(folder / "expected.safetensors")
    changed = [n for n, p in loaded.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > 0.9 * len(before)
    data = batch()
    with torch.no_grad():
        logits = loaded.eval()(
            input_ids=torch.cat([data["prompt_ids"], data["response_ids"]], 1),
            pixel_values=data["pixel_values"],
            use_cache=False,
        ).logits[:, 7:-1]
    expected = logits.log_softmax(-1).gather(-1, data["response_ids"].unsqueeze(-1)).flatten()
    found = load_file(folder / "trained.logprobs.safetensors")["logprobs"]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4
