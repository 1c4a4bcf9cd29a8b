"""Completions of a GRPO step, with their rewards, as a Parquet file."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1v3.data.sample import Sample
from r1v3.files import write_bytes
from r1v3.trainer.episode import Episode

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("question", pa.string()),
        ("ground_truth", pa.string()),
        ("response", pa.string()),
        ("finished", pa.bool_()),
        ("reward", pa.float64()),
        ("accuracy", pa.float64()),
        ("format", pa.float64()),
        ("extracted", pa.string()),
        ("advantage", pa.float32()),
        ("response_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
    ]
)


def write_rollouts(
    path: Path, episode: Episode, indices: Sequence[int], samples: Sequence[Sample],
    texts: Sequence[str],
) -> None:  # fmt: skip
    """Write one row per completion.

    Columns: `row` of the training data (of those rows that were kept), question, ground truth,
    response as text, whether it finished, the reward and its parts, the answer that was found in
    it, its advantage, and per token its id and the log-prob and entropy (nats) of the distribution
    it was drawn from.

    Args:
        indices: P positions in the training data.
        samples: the P questions there.
        texts: P * G completions.
    """
    g, rollout = episode.group_size, episode.rollout
    rows: list[dict[str, Any]] = []
    for i, (text, reward) in enumerate(zip(texts, episode.rewards, strict=True)):
        kept = rollout.mask[i]
        rows.append(
            {
                "row": indices[i // g],
                "question": samples[i // g].question,
                "ground_truth": samples[i // g].ground_truth,
                "response": text,
                "finished": bool(rollout.finished[i]),
                "reward": reward.total,
                "accuracy": reward.accuracy,
                "format": reward.format,
                "extracted": reward.extracted,
                "advantage": episode.advantages[i].item(),
                "response_ids": rollout.response_ids[i][kept].tolist(),
                "logprobs": rollout.logprobs[i][kept].tolist(),
                "entropy": rollout.entropy[i][kept].tolist(),
            }
        )
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)
    write_bytes(path, file.getvalue())
