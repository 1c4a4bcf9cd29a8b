"""InternVL on megatron-core is transformers' InternVL in every parallel layout.

Four processes run all cases once, over gloo on the CPU; the tests judge what they report.
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.model.megatron import reference
from tests.model.megatron.reference import WORLD
from tests.processes import marked, run_ranks, slow_chosen

PARITY = [
    "tp1",
    "tp2",
    "pp2",
    "tp2_pp2",
    "tp2_sp",
    "tp4_sp",
    "tp2_pp2_sp_recompute",
    "tied_tp2",
    "tied_tp2_pp2",
    "plain_tp2",
    "wide_tp2",
]
DECODING = ["decode_tp1", "decode_tp2_sp", "decode_tp4", "decode_pp2", "decode_tp2_pp2_sp"]
CHECKPOINTS = ["checkpoint_main", "checkpoint_tied"]
TRAINING = ["training_tp2", "training_tied_tp2_pp2_sp"]
# Left to `make test-all`: what stands between layouts that run always.
EXHAUSTIVE = (
    "tp2",
    "pp2",
    "tp2_pp2",
    "tp2_sp",
    "tied_tp2",
    "decode_tp1",
    "decode_tp2_sp",
    "decode_pp2",
    *CHECKPOINTS,
)
OTHERS = ["recompute", "bfloat16", "frozen", "fresh", "refusals"]
# megatron-core's checkpoint writer fails without it, and then waits for itself forever.
HAS_PSUTIL = importlib.util.find_spec("psutil") is not None
Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Reports:
    """Results by case, of every rank."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in reference.CONFIGS:
        reference.write(folder / name, name)
    cases = PARITY + DECODING + TRAINING + OTHERS + (CHECKPOINTS if HAS_PSUTIL else [])
    if not slow_chosen(request):
        cases = [case for case in cases if case not in EXHAUSTIVE]
    run_ranks("tests.model.megatron.worker", WORLD, folder, ",".join(cases))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


def model_of(case: str) -> str:
    first = case.split("_")[0]
    return first if first in reference.BATCHES else "main"


def of(everything: Reports, case: str) -> Reports:
    return [rank[case] for rank in everything]


@pytest.mark.parametrize("case", marked(PARITY, EXHAUSTIVE))
def test_outputs_equal_transformers(everything: Reports, case: str) -> None:
    """Fails if packing, splitting or recomputing changes a hidden state, log-prob or entropy."""
    seen = [rank["outputs"] for rank in of(everything, case) if rank["outputs"]]
    stages = 2 if "pp2" in case else 1
    assert len(seen) == WORLD // stages
    for outputs in seen:
        assert len(outputs) == 3 * len(reference.BATCHES[model_of(case)])
        assert {name: error for name, error in outputs.items() if error > 1e-5} == {}


@pytest.mark.parametrize("case", marked(PARITY, EXHAUSTIVE))
def test_gradients_equal_transformers(everything: Reports, case: str) -> None:
    """Fails if any parameter of any rank gets another gradient than in transformers."""
    expected = sum(1 for _ in reference.tiny_model(reference.CONFIGS[model_of(case)]).parameters())
    for rank in of(everything, case):
        assert len(rank["gradients"]) == expected
        wrong = {name: error for name, error in rank["gradients"].items() if not error <= 1e-5}
        # A bias of all keys changes no softmax: its gradient is rounding, here and there.
        assert all(case == "plain_tp2" and "vision" in n and "k_proj.bias" in n for n in wrong)


@pytest.mark.parametrize("case", marked(PARITY, EXHAUSTIVE))
def test_padding_gets_no_gradient(everything: Reports, case: str) -> None:
    """Fails if a padded head or vocabulary row would start to move."""
    assert [rank["padding"] for rank in of(everything, case)] == [0.0] * WORLD


@pytest.mark.parametrize("case", marked(PARITY, EXHAUSTIVE))
def test_replicated_parameters_stay_equal(everything: Reports, case: str) -> None:
    """Fails if tensor-parallel ranks would drift apart in what each of them holds whole."""
    assert [rank["unequal_replicas"] for rank in of(everything, case)] == [[]] * WORLD


def test_recomputing_changes_nothing(everything: Reports) -> None:
    """Fails if a recomputed layer sees the layout of another micro-batch of the pipeline."""
    for rank in of(everything, "recompute"):
        assert len(rank["distances"]) > 10
        assert {name: d for name, d in rank["distances"].items() if d > 1e-6} == {}


def test_bfloat16_is_close(everything: Reports) -> None:
    """Fails if some tensor does not follow the dtype, or loses more than bfloat16 does."""
    for rank in of(everything, "bfloat16"):
        assert rank["finite"]
        assert all(0 < error < 0.1 for error in rank["errors"])
    assert sum(bool(rank["errors"]) for rank in of(everything, "bfloat16")) == 2


def test_connector_alone_can_be_trained(everything: Reports) -> None:
    """Fails if a stage without trained parameters, or a batch without images, breaks the step."""
    for rank in of(everything, "frozen"):
        assert all(name.startswith("vision_projection.") for name in rank["trained"])
        assert {name: d for name, d in rank["gradients"].items() if d > 1e-5} == {}
        assert len(rank["gradients"]) == 6
        assert set(rank["text_only"]) <= {0.0}
    assert [len(rank["trained"]) for rank in of(everything, "frozen")] == [6, 6, 0, 0]


@pytest.mark.parametrize("case", TRAINING)
def test_a_step_of_megatrons_optimizer(everything: Reports, case: str) -> None:
    """Fails if DDP and the distributed optimizer do not train this model.

    The gradient norm shows that sharded and replicated parameters are marked as such, the padding
    that weight decay and Adam leave zeros alone.
    """
    which = "tied" if "tied" in case else "main"
    model = reference.tiny_model(reference.CONFIGS[which])
    total = 0.0
    for batch in reference.BATCHES[which]:
        truth = reference.truth(model, batch)
        loss = reference.loss(truth.logprobs, truth.entropy)
        loss.backward()
        total += float(loss.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    squares = sum(float(gradient.double().square().sum()) for gradient in gradients)
    for rank in of(everything, case):
        assert rank["norms"][0] == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert all(loss == pytest.approx(total, rel=1e-5) for loss in rank["losses"][:1] if loss)
        assert rank["losses"][1] < total
        assert rank["padding"] == 0.0
        assert rank["moved"] == sum(1 for _ in model.parameters())
    assert sum(rank["losses"][0] > 0 for rank in of(everything, case)) >= WORLD // 2


@pytest.mark.parametrize("case", marked(DECODING, EXHAUSTIVE))
def test_decoding_equals_the_whole_forward(everything: Reports, case: str) -> None:
    """Fails if a cache mixes up rows, positions or heads, also after rows were dropped."""
    for rank in of(everything, case):
        assert len(rank["errors"]) == 9
        assert max(rank["errors"]) < 1e-5
        assert rank["same"], "ranks have different logits and would sample different tokens"
        assert not rank["graph"]
        assert rank["refusals"] == [
            "the cache holds its 24 tokens; prefill with more",
            "[2] token ids for 3 rows",
        ]


@pytest.mark.parametrize("case", marked(CHECKPOINTS, EXHAUSTIVE))
@pytest.mark.skipif(not HAS_PSUTIL, reason="megatron-core's checkpoint writer needs psutil")
def test_checkpoints_load_in_other_layouts(everything: Reports, case: str) -> None:
    """Fails if a checkpoint of TP2 x PP2 is not the same model at TP1 and at TP4."""
    for rank in of(everything, case):
        assert rank["unequal"] == {"tp1": [], "tp4": []}
        assert max(rank["outputs"].values()) < 1e-5
        assert rank["padding"] == 0.0


def test_a_new_model(everything: Reports) -> None:
    """Fails if random weights fill the padding, or rollouts would keep a graph in memory."""
    for rank in of(everything, "fresh"):
        assert (rank["padding"], rank["graph"], rank["finite"]) == (0.0, False, True)


def test_refusals_name_the_value(everything: Reports) -> None:
    """Fails if something that cannot work is accepted or dies in Megatron without a reason."""
    expected = {
        "heads": "5 vision heads",
        "vocabulary": "509 vocabulary rows",
        "stages": "3 language layers cannot be split over 1 pipeline stages",
        "norm": "'batch_norm'",
        "rope": "'yarn'",
        "features": "16 image tokens for 12 image features",
        "no_images": "16 image tokens for 0 image features",
        "side": "42 x 42",
        "length": "23 tokens",
    }
    for rank in of(everything, "refusals"):
        for name, words in expected.items():
            assert words in rank[name]


def test_the_truth_is_not_trivial(tmp_path: Path) -> None:
    """Fails if the comparison could pass because everything compared is zero or constant."""
    reference.write(tmp_path / "main", "main")
    truth = load_file(tmp_path / "main" / "truth.safetensors")
    gradients = {name: grad for name, grad in truth.items() if name.startswith("grad.")}
    assert len(gradients) == 79
    assert min(float(grad.abs().max()) for grad in gradients.values()) > 1e-3
    assert float(truth["0.logprobs"].std()) > 0.1
