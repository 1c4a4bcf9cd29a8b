"""The plan's formulas against bytes counted in the real modules, rank by rank."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import InternVLConfig

from r1v3.model.flops import Dimensions
from r1v3.model.internvl import internvl_config
from r1v3.plan.memory import (
    Pack,
    Shards,
    State,
    image_kept,
    layer_workspace,
    layers_kept,
    stage_parameters,
)
from tests.processes import PATIENCE

ROOT = Path(__file__).parents[2]
ALL = {"vision": True, "connector": True, "llm": True}


def config() -> InternVLConfig:
    """Every size different, so that no term can stand in for another."""
    return internvl_config(
        vocab_size=500,
        image_token_id=7,
        image_size=56,
        patch_size=14,
        vision={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 160,
        },
        text={
            "hidden_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 200,
            "max_position_embeddings": 512,
        },
    )


def wide() -> InternVLConfig:
    """The 38B's proportions at an eighth of its width, with long packs: a layer's moments are
    what counts, and weights little."""
    return internvl_config(
        vocab_size=500,
        image_token_id=7,
        image_size=56,
        patch_size=14,
        vision={
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 160,
        },
        text={
            "hidden_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 3456,
            "max_position_embeddings": 2048,
        },
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One rank of a layout."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    stage: int = 0
    data: int = 2
    sequence: bool = False
    recompute: str = "none"
    dtype: str = "float32"
    first: int | None = None
    frozen: tuple[str, ...] = ()
    state: bool = False
    peak: bool = False

    @property
    def modules(self) -> dict[str, bool]:
        return {part: part not in self.frozen for part in ALL}

    @property
    def shards(self) -> Shards:
        layers = (5,) if self.pipeline == 1 else (self.first or 0, 5 - (self.first or 0))
        layers = (4,) if self.peak else layers
        return Shards(
            tensor=self.tensor,
            sequence=self.sequence,
            layers=layers,
            recompute=self.recompute == "full",
            element=4 if self.dtype == "float32" else 2,
            padded_heads=8,
            padded_vocab=512,
            cuda=False,
            context=self.context,
        )

    @property
    def pack(self) -> Pack:
        if self.peak:
            return Pack(1, 4, 400, 401, 2)
        # Two prompts of 31 tokens with 3 responses of 34: 2 * 31 + 6 * 33 = 260 rows, even. Where
        # they are divided, chunks of two ranks are 8 rows each.
        return Pack(2, 3, 31, 34, 2) if self.context == 1 else Pack(2, 3, 32, 33, 2)


CASES = (
    Case(state=True),
    Case(tensor=2, sequence=True, dtype="bfloat16", state=True, data=4),
    Case(tensor=2, sequence=True, recompute="full", dtype="bfloat16"),
    Case(tensor=2, sequence=False, dtype="float32", frozen=("vision",), state=True),
    Case(tensor=2, sequence=True, pipeline=2, stage=0, first=2, recompute="full"),
    Case(tensor=2, sequence=True, pipeline=2, stage=1, first=2, dtype="bfloat16", state=True),
    Case(pipeline=2, stage=1, first=2, recompute="full", dtype="bfloat16"),
    Case(context=2, tensor=2, sequence=True, data=1, state=True),
    Case(tensor=8, sequence=True, recompute="full", peak=True),
    Case(tensor=2, sequence=True, recompute="full", peak=True),
)
PLAIN = [index for index, case in enumerate(CASES) if not case.peak]


@cache
def measured() -> list[dict[str, Any]]:
    """Memory the real modules hold in each case, counted by one process of its own."""
    lines = [
        json.dumps(
            {
                **vars(case),
                "modules": case.modules,
                "config": (wide() if case.peak else config()).to_dict(),
                "pack": dataclasses.astuple(case.pack)[:4],
            }
        )
        for case in CASES
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.plan.worker"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("index", PLAIN)
def test_parameters_of_a_rank(index: int) -> None:
    """Fails if the formulas that the search uses count other modules than are built."""
    case, found = CASES[index], measured()[index]
    formula = stage_parameters(Dimensions.of(config()), case.shards, case.stage)
    assert {part: n for part, n in formula.items() if n} == found["parameters"]


@pytest.mark.parametrize("index", PLAIN)
def test_saved_activations_of_a_rank(index: int) -> None:
    """Fails if the plan promises room that the backward's saved tensors need, or the reverse."""
    case, found = CASES[index], measured()[index]
    dims, pack, shards = Dimensions.of(config()), case.pack, case.shards
    assert (found["tokens"], found["keys"]) == (shards.rows(pack), shards.keys(pack))
    if case.context == 1:
        assert (found["tokens"], found["keys"], found["labels"]) == (pack.tokens, pack.keys, 204)
    else:
        assert abs(found["labels"] - pack.labels / case.context) <= pack.responses
    kept = layers_kept(dims, shards, pack, case.stage)
    if case.stage == 0:
        kept += image_kept(dims, shards, pack, case.modules)
    # Token ids and masks of the embedding are what the formulas leave out.
    assert found["saved"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if case.state])
def test_gradients_and_optimizer_state_of_a_rank(index: int) -> None:
    """Fails if frozen parts are charged, or the optimizer's shard is not a share of the whole."""
    case, found = CASES[index], measured()[index]
    counts = stage_parameters(Dimensions.of(config()), case.shards, case.stage)
    trained = sum(n for part, n in counts.items() if case.modules[part])
    state = State.of(
        counts,
        case.modules,
        element=case.shards.element,
        data=case.data * case.context,
        distributed=True,
    )
    assert state.weights == sum(counts.values()) * case.shards.element
    assert state.gradients == 4 * trained
    # Buffers end on a multiple of 128 elements, and parameters start on 64.
    assert state.gradients <= found["gradients"] < 1.1 * state.gradients
    assert found["optimizer"] == pytest.approx(state.optimizer, rel=0.1)


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if case.peak])
def test_the_worst_moment_of_a_recomputed_layer(index: int) -> None:
    """Fails if a step needs more at some moment of its backward than the plan has room for, or if
    the plan is so careful that it refuses what would run."""
    case, found = CASES[index], measured()[index]
    dims, pack = Dimensions.of(wide()), case.pack
    kept = layers_kept(dims, case.shards, pack, 0) + image_kept(dims, case.shards, pack, ALL)
    assert found["tokens"] == pack.tokens
    planned = kept + layer_workspace(dims, case.shards, pack)
    assert 0.97 * found["peak"] < planned < 1.15 * found["peak"]
