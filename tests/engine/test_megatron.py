"""MegatronEngine in every parallel layout is HFEngine, and its checkpoints go on bit for bit.

Four processes run all cases once, over gloo on the CPU; the tests judge what they report.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from r1v3.data.encoding import collate
from r1v3.engine.hf.engine import HFEngine
from r1v3.files import digest_of
from r1v3.model.internvl import load_model
from r1v3.model.parts import PARTS, part_of
from tests import tiny
from tests.engine import recorded
from tests.engine.layouts import LAYOUTS, OTHER_LAYOUTS, PATTERNS, WORLD, only
from tests.model.conversion.checkpoints import original_config, original_tensors, parameters_of
from tests.processes import marked, run_ranks, slow_chosen
from tests.served_folder import assert_served

pytest.importorskip("megatron.core")

CASES = [
    "ranks",
    *LAYOUTS,
    "saving",
    *(f"loading_{name}" for name in OTHER_LAYOUTS),
    *(f"train_{name}" for name in PATTERNS),
    "train_connector_dp4",
    "train_cp2",
    "bfloat16",
    "whole_optimizer",
    "whole_optimizer_connector",
    "divided_tp2_pp2",
    "divided_dp4",
    "divided_cp2_tp2",
    "before_blocks",
    "flat",
    "text_alone",
    "refused",
    "native",
    "original",
]
# Left to `make test-all`: what stands between cases that run always.
EXHAUSTIVE = (
    "tp2",
    "pp2",
    "cp2",
    "dp2_whole_optimizer",
    "train_connector_dp4",
    "tp4",
    "tp2_sequence",
    "cp2_pp2",
    "cp2_dp2_whole_optimizer",
    "cp4",
    "divided_cp2_tp2",
    "loading_cp2_dp2",
    "train_connector_llm",
    "train_vision_llm",
    "train_cp2",
    "whole_optimizer",
)
RESUMED = [case for case in CASES if case.startswith(("train_", "whole_")) or case == "bfloat16"]
TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


def an_engine(folder: Path, **settings: Any) -> HFEngine:
    arguments = {"modules": only(PARTS), **recorded.TRAINING, **settings}
    return HFEngine(load_model(folder), tiny.tokenizer(), **arguments)


def write_models(folder: Path) -> None:
    """One model as r1v3 writes it, as transformers does, and under the remote code's names."""
    net = recorded.a_model()
    (folder / "model").mkdir()
    HFEngine(net, tiny.tokenizer(), modules={}).save(folder / "model")
    net.save_pretrained(folder / "native")
    (folder / "original").mkdir()
    stored = original_tensors(parameters_of(net))
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        folder / "original" / "model.safetensors",
    )
    config: dict[str, Any] = original_config(net)
    config["image_token_id"] = net.config.image_token_id
    config["llm_config"]["rope_theta"] = net.config.text_config.rope_parameters["rope_theta"]
    (folder / "original" / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Files the ranks were given and have written; they run once for all tests of this file."""
    folder = tmp_path_factory.mktemp("megatron")
    write_models(folder)
    recorded.write_rollout(an_engine(folder / "model"), folder / "rollout.safetensors")
    every = slow_chosen(request)
    cases = [case for case in CASES if every or case not in EXHAUSTIVE]
    run_ranks("tests.engine.megatron_worker", WORLD, folder, ",".join(cases))
    return folder


def reports(folder: Path, case: str) -> list[dict[str, Any]]:
    """Reports of each rank of a case."""
    files = sorted(folder.glob(f"{case}.rank?.json"))
    assert files, case
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[recorded.Seen, Tensors]:
    """HFEngine's results of the recorded batch, and the least |gradient| of its two steps."""
    engine = an_engine(folder / "model")
    least: Tensors = {}
    step = engine.optimizer.step

    def keep(*args: object, **kwargs: object) -> object:
        for name, parameter in engine.trainable.items():
            assert parameter.grad is not None
            size = parameter.grad.abs()
            least[name] = torch.minimum(least.get(name, size), size)
        return step()

    engine.optimizer.step = keep  # type: ignore[method-assign]
    return recorded.record(engine, folder / "rollout.safetensors"), least


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value or of 1 nat.

    An estimate of a KL divergence is a small difference of numbers around 1.
    """
    assert found.shape == wanted.shape
    if not found.numel():
        return 0.0
    scale = max(float(wanted.abs().max()), 1.0)
    return float((found - wanted).abs().max()) / scale


def wrong_metrics(found: dict[str, float], wanted: dict[str, float]) -> dict[str, Any]:
    assert found.keys() == wanted.keys()
    return {
        key: (found[key], value)
        for key, value in wanted.items()
        if found[key] != pytest.approx(value, rel=TOLERANCE, abs=1e-7)
    }


def wrong_weights(found: Tensors, wanted: Tensors, least: Tensors) -> dict[str, float]:
    """Weights that differ by more than the tolerance of their largest.

    AdamW's steps have the size of the learning rate however small a gradient is, so that where the
    true gradient is zero (a key's bias shifts all scores of a row alike) rounding moves weights by
    a step in any direction. Compared is what has a gradient in both steps, and what has none at
    all: rows of the embedding that only decay.
    """
    wrong = {}
    for name, gradient in least.items():
        certain = (gradient > 1e-6) | (gradient == 0)
        one, other = (tensors[f"weight.{name}"] for tensors in (found, wanted))
        scale = float(other.abs().max())
        error = float(((one - other).abs() * certain).max()) / scale
        if error > TOLERANCE:
            wrong[name] = error
    return wrong


@pytest.mark.parametrize("layout", marked(LAYOUTS, EXHAUSTIVE))
def test_every_layout_is_the_single_process(
    folder: Path, truth: tuple[recorded.Seen, Tensors], layout: str
) -> None:
    """Fails if loss, log-probs, entropies, gradient norms or weights depend on the layout."""
    wanted, least = truth
    found = load_file(folder / f"{layout}.safetensors")
    ranks = reports(folder, layout)
    assert len(ranks) == LAYOUTS[layout][0]
    assert all(rank == ranks[0] for rank in ranks), "ranks were given different values"
    for one, other in zip(ranks[0]["metrics"], wanted.metrics, strict=True):
        assert wrong_metrics(one, other) == {}
    assert found.keys() == wanted.tensors.keys()
    numbers = [name for name in found if not name.startswith(("weight.", "rollout."))]
    # Fractions of clipped tokens and counts are among these.
    assert len(numbers) > 30
    wrong = {name: distance(found[name], wanted.tensors[name]) for name in numbers}
    assert {name: error for name, error in wrong.items() if error > TOLERANCE} == {}
    assert wrong_weights(found, wanted.tensors, least) == {}


@pytest.mark.parametrize("layout", marked(LAYOUTS, EXHAUSTIVE))
def test_every_layout_samples_the_same_tokens(
    folder: Path, truth: tuple[recorded.Seen, Tensors], layout: str
) -> None:
    """Fails if completions of the training weights depend on how they are split."""
    wanted, found = truth[0].tensors, load_file(folder / f"{layout}.safetensors")
    for name in ("response_ids", "mask", "sampled", "finished"):
        assert torch.equal(found[f"rollout.{name}"], wanted[f"rollout.{name}"])
    for name in ("logprobs", "entropy"):
        assert distance(found[f"rollout.{name}"], wanted[f"rollout.{name}"]) < TOLERANCE


@pytest.mark.parametrize(
    "case", marked(["divided_tp2_pp2", "divided_dp4", "divided_cp2_tp2"], EXHAUSTIVE)
)
def test_divided_groups_are_the_single_process(
    folder: Path, truth: tuple[recorded.Seen, Tensors], case: str
) -> None:
    """Fails if a prompt that is repeated in the micro-batches of its completions teaches something
    else than once for all of them, or an output comes back as another micro-batch's."""
    wanted, least = truth
    engine = an_engine(folder / "model")
    metrics = recorded.step(engine, folder / "rollout.safetensors", 0)
    ranks, found = reports(folder, case), load_file(folder / f"{case}.safetensors")
    assert all(rank == ranks[0] for rank in ranks)
    assert wrong_metrics(ranks[0]["metrics"], metrics) == {}
    after = {f"weight.{name}": tensor for name, tensor in engine.export_hf()}
    assert wrong_weights(found, after, least) == {}
    places = [
        (i, row) for i, (a, b) in enumerate(recorded.MICRO_BATCHES) for row in range(2 * (b - a))
    ]
    for number, (i, row) in enumerate(places):
        logprobs = wanted.tensors[f"step0.{i}.token_logprobs"][row]
        length = recorded.LENGTHS[number]
        assert distance(found[f"{number}.logprobs"][0], logprobs[:length]) < TOLERANCE


def test_the_recorded_batch_tests_something(
    folder: Path, truth: tuple[recorded.Seen, Tensors]
) -> None:
    """Fails if the comparisons above would pass because nothing happens in what they compare."""
    seen, least = truth
    for number, metrics in enumerate(seen.metrics):
        assert metrics["grad_norm"] > 2 * recorded.TRAINING["max_grad_norm"]
        assert all(metrics[f"grad_norm_{part}"] > 0.05 for part in PARTS)
        outputs = [seen.tensors[f"step{number}.{i}.clip_low_fraction"] for i in range(3)]
        outputs += [seen.tensors[f"step{number}.{i}.clip_high_fraction"] for i in range(3)]
        assert sum(float(output) > 0 for output in outputs) >= 2
    certain = sum(int((gradient > 1e-6).sum()) for gradient in least.values())
    assert certain > 0.7 * sum(gradient.numel() for gradient in least.values())
    assert len(tiny.tokenizer()) % 128, "the vocabulary needs no padding"
    rollout = {n.removeprefix("rollout."): t for n, t in seen.tensors.items() if "rollout." in n}
    assert (rollout["mask"] & ~rollout["sampled"]).any(), "no token was forced"
    assert len(set(rollout["mask"].sum(1).tolist())) > 1, "all rows end together"


@pytest.mark.parametrize("case", marked(RESUMED, EXHAUSTIVE))
def test_a_checkpoint_goes_on_bit_for_bit(folder: Path, case: str) -> None:
    """Fails if moments, counters or main parameters are lost, where a rank trains nothing too."""
    ranks = reports(folder, case)
    for rank in ranks:
        assert rank["loaded"] and rank["same"] and rank["finite"]
        assert rank["seconds"][0] == rank["seconds"][1] == ranks[0]["seconds"][0]
        assert rank["seconds"][0]["grad_norm"] > 0


@pytest.mark.parametrize("pattern", marked(PATTERNS, ("connector_llm", "vision_llm")))
def test_exactly_the_named_parts_are_trained(folder: Path, pattern: str) -> None:
    """Fails if a frozen weight moves, a trained one does not, or freezing changes a gradient."""
    trained = PATTERNS[pattern]
    engine = an_engine(folder / "model")
    wanted = {f"weight.{name}" for name, _ in engine.export_hf() if part_of(name) in trained}
    metrics = recorded.step(engine, folder / "rollout.safetensors", 0)
    for rank in reports(folder, f"train_{pattern}"):
        assert set(rank["moved"]) == wanted
        for part in PARTS:
            norm = metrics[f"grad_norm_{part}"] if part in trained else 0.0
            assert rank["first"][f"grad_norm_{part}"] == pytest.approx(norm, rel=TOLERANCE)


def test_a_stage_can_be_left_with_nothing_to_train(folder: Path) -> None:
    """Fails if the test above has no rank without an optimizer's parameter."""
    for case in ("train_connector", "whole_optimizer_connector"):
        held = [rank["optimizer_dtypes"] for rank in reports(folder, case)]
        assert held == [["torch.float32"]] * 2 + [[]] * 2


def test_a_micro_batch_without_an_advantage_moves_no_bit(folder: Path) -> None:
    """Fails if leaving out what teaches nothing changes the step, so that it could not be a
    default."""
    for rank in reports(folder, "flat"):
        whole, without = rank["left"]
        assert whole == without and whole["metrics"]["grad_norm"] > 0


def test_a_step_of_the_connector_without_pictures_changes_nothing(folder: Path) -> None:
    """Fails if a loss that reaches no trained parameter breaks the step, or moves something."""
    for rank in reports(folder, "text_alone"):
        assert rank["same"] and rank["outputs"] == [0, 1]
        assert rank["metrics"]["grad_norm"] == 0 and rank["metrics"]["loss"] < -1


def test_a_gradient_that_is_not_finite_is_refused_on_every_rank(
    folder: Path, truth: tuple[recorded.Seen, Tensors]
) -> None:
    """Fails if some rank would step or hang, or something of the refused step stays behind."""
    for rank in reports(folder, "refused"):
        assert rank["norm"] == "nan" and rank["same"]
        assert wrong_metrics(rank["next"], truth[0].metrics[0]) == {}


def test_bfloat16_trains_float32_main_parameters(
    folder: Path, truth: tuple[recorded.Seen, Tensors]
) -> None:
    """Fails if main parameters, moments or gradients would lose what bfloat16 cannot hold."""
    wanted = truth[0].metrics[0]
    for rank in reports(folder, "bfloat16"):
        assert rank["dtypes"] == ["torch.bfloat16"]
        assert rank["gradient_dtypes"] == rank["optimizer_dtypes"] == ["torch.float32"]
        assert rank["first"]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)
        assert rank["first"]["loss"] == pytest.approx(wanted["loss"], rel=0.05)


def test_what_is_saved_is_the_moment_it_was_asked_for(folder: Path) -> None:
    """Fails if the step that is taken while files are written finds its way into them."""
    for rank in reports(folder, "saving"):
        assert rank["done"]
        assert rank["metrics"][0] == rank["metrics"][1]
        assert rank["digests"][0] == rank["digests"][1]


def test_a_checkpoint_with_gathered_optimizer_states_goes_on(folder: Path) -> None:
    """Fails if a run that was begun before each rank wrote its own blocks cannot be resumed."""
    for rank in reports(folder, "before_blocks"):
        assert rank["metrics"][0] == rank["metrics"][1]
        assert rank["digests"][0] == rank["digests"][1]


def test_every_rank_writes_and_hashes_its_own_part(folder: Path) -> None:
    """Fails if one rank writes for others, a digest is another file's, or the parts of a model
    folder are not the model."""
    ranks = reports(folder, "saving")
    optimizer = [f"megatron/__{rank}_0.distcp" for rank in range(4)]
    for rank, own in zip(ranks, optimizer, strict=True):
        assert own in rank["written"]
        # Its moments, and what describes them.
        assert rank["held"] < rank["written"][own][0] < 2 * rank["held"]
    written = {name: digest for rank in ranks for name, digest in rank["written"].items()}
    assert sum(len(rank["written"]) for rank in ranks) == len(written) == 5
    for name, digest in written.items():
        assert list(digest_of(folder / "state" / name)) == digest
    parts = sorted((folder / "divided").glob("*.safetensors"))
    assert len(parts) == 5 and all(len(rank["parts"]) in (1, 2) for rank in ranks)
    whole = load_file(folder / "state/model.safetensors")
    divided = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    assert divided.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in divided.items())
    InternVLForConditionalGeneration.from_pretrained(folder / "divided")


@pytest.mark.parametrize("layout", marked(OTHER_LAYOUTS, ("cp2_dp2",)))
def test_a_checkpoint_goes_on_in_other_layouts(
    folder: Path, truth: tuple[recorded.Seen, Tensors], layout: str
) -> None:
    """Fails if TP2 x PP2 cannot be left for another number of ranks with moments and all."""
    [wanted] = {json.dumps(rank["metrics"][0]) for rank in reports(folder, "saving")}
    for rank in reports(folder, f"loading_{layout}"):
        assert wrong_metrics(rank["metrics"][0], json.loads(wanted)) == {}
    saved = load_file(folder / "saving.safetensors")
    assert wrong_weights(load_file(folder / f"loading_{layout}.safetensors"), saved, truth[1]) == {}


@pytest.mark.parametrize("names", ["native", "original"])
def test_what_is_trained_and_saved_loads_in_transformers(folder: Path, names: str) -> None:
    """Fails if a model of either layout is not the same model after its way through Megatron."""
    found = load_file(folder / f"{names}.safetensors")
    assert_served(folder / f"saved-{names}", max_tiles={"native": 1, "original": 12}[names])
    theirs = InternVLForConditionalGeneration.from_pretrained(
        folder / f"saved-{names}", dtype=torch.float32
    ).eval()
    for row, example in enumerate(recorded.examples()):
        batch = collate([example], 0)
        with torch.no_grad():
            output = theirs(input_ids=batch.prompt_ids, pixel_values=batch.pixel_values)
        assert float((output.logits[0, -1] - found["logits"][row]).abs().max()) < 1e-4
    ours = HFEngine(theirs, tiny.tokenizer(), modules=None, temperature=0.9)
    for index, (logprobs, entropy) in enumerate(ours.evaluate(recorded.micro_batches())):
        assert float((logprobs - found[f"{index}.logprobs"]).abs().max()) < 1e-4
        assert float((entropy - found[f"{index}.entropy"]).abs().max()) < 1e-4
    assert all(rank["moved"] and rank["back"] for rank in reports(folder, names))


def test_every_rank_hears_the_same(folder: Path) -> None:
    """Fails if an error of the first rank leaves the others waiting, or values go astray."""
    ranks = reports(folder, "ranks")
    assert [rank["is_main"] for rank in ranks] == [True, False, False]
    for number, rank in enumerate(ranks):
        assert rank["gathered"] == [{"rank": n} for n in range(3)]
        assert (rank["broadcast"], rank["led"]) == ("from 0", "led by 0")
        assert rank["error"] == "only the first rank knows"
        assert rank["divided"] == ["0 by 0", "1 by 0", "2 by 1", "3 by 1", "4 by 2"]
        assert rank["failed"] == "the last has failed"
        assert rank["shares"][0] == [[0, 1, 2], [3, 4], [5, 6]][number]
    for shares in zip(*(rank["shares"] for rank in ranks), strict=True):
        assert sum(shares, []) == list(range(sum(map(len, shares))))


def test_ranks_save_and_verify_together(folder: Path) -> None:
    """Fails if a file is hashed twice or by nobody, or ranks disagree on what is intact."""
    ranks = reports(folder, "ranks")
    files = sorted(f"{rank}-{n}.safetensors" for rank in range(3) for n in range(2))
    wanted = [*files, "trainer.json", "trainer.safetensors"]
    for key in ("hashed", "verified"):
        assert sorted(sum((rank[key] for rank in ranks), [])) == wanted
        assert all(len(rank[key]) >= 2 for rank in ranks)
    for rank in ranks:
        assert rank["state"] == {"n": 1}
        assert rank["kept"] == ["step-000002", "step-000003"]
        assert rank["disk_full"] == "[Errno 28] no room ['step-000002', 'step-000003']"
        assert rank["damaged"].endswith("step-000003/2-1.safetensors has 6 bytes, expected 84")
        assert rank["latest"] == "step-000002"
    assert [rank["warnings"] for rank in ranks] == [1, 0, 0]
