"""Messages between the ranks of a GRPO step: each gets its own micro-batches and numbers."""

import json
from pathlib import Path

import pytest

from tests.processes import run_ranks
from tests.tiny_run import home, write_configs

pytest.importorskip("megatron.core")
# Id, log-prob, and whether it was sampled.
TOKEN_BYTES = 9


def test_a_rank_receives_its_own_micro_batches_and_numbers_of_the_others(tmp_path: Path) -> None:
    """Fails if token ids, log-probs or outputs of another replica's micro-batches reach a rank, a
    completion is sent to a rank that has it, or what every rank is told grows with responses."""
    write_configs(tmp_path)
    layout = ["engine=megatron", "parallel.tensor=2"]
    own = [f"run={tmp_path / 'run'}", f"model={home() / 'base'}"]
    run_ranks("tests.trainer.counting_ranks", 4, tmp_path, *own, *layout)
    ranks = [json.loads((tmp_path / f"counted{rank}.json").read_text()) for rank in range(4)]
    lengths = ranks[0]["lengths"]
    assert sorted(row for rank in ranks for row in rank["own"]) == list(range(len(lengths)))
    assert all(rank["own"] for rank in ranks)
    assert ranks[0]["rows"] == ranks[1]["rows"] != ranks[2]["rows"] == ranks[3]["rows"]
    assert sorted(ranks[0]["rows"] + ranks[2]["rows"]) == list(range(len(lengths)))
    for rank in ranks:
        sent = [row for row in rank["rows"] if row not in rank["own"]]
        received = rank["received"]
        assert received.pop("exchange") == TOKEN_BYTES * sum(lengths[row] for row in sent)
        assert sum(received.values()) < 400 * len(lengths), received
        assert (rank["tokens"], rank["entropy"]) == (sum(lengths), ranks[0]["entropy"])
