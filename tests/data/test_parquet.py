"""Parquet files of any size: the bytes of a piece are bounded, the rows and their order kept."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1v3.data import parquet
from r1v3.data.parquet import read_rows, row_bytes
from r1v3.data.sample import Sample, make_sample
from r1v3.data.schema import load_samples, write_samples
from tests.data.sample_rows import a_row

KB = 1 << 10


def picture(size: int, seed: int = 0) -> bytes:
    """A picture file of about this many bytes."""
    buffer = io.BytesIO()
    Image.new("L", (KB, max(1, size // KB)), seed % 256).save(buffer, "PPM")
    return buffer.getvalue()


def samples_of(sizes: list[int]) -> list[Sample]:
    return [
        make_sample(
            question="q", ground_truth="1", data_source="t", index=i,
            images=[picture(size, i)] if size else [],
        )
        for i, size in enumerate(sizes)
    ]  # fmt: skip


SIZES: dict[str, list[int]] = {
    "equal": [8 * KB] * 20,
    "growing": [n * KB for n in range(1, 25)],
    "falling": [n * KB for n in range(24, 0, -1)],
    "one large": [KB] * 9 + [300 * KB] + [KB] * 9,
    "large first": [300 * KB] + [KB] * 20,
    "large last": [KB] * 20 + [300 * KB],
    "all large": [70 * KB] * 6,
    "large and none": [0, 90 * KB] * 5,
    "no pictures": [0] * 40,
    "one row": [500 * KB],
    "just fitting": [32 * KB - 200] * 8,
    "many small": [KB] * 300,
}


@pytest.mark.parametrize("kind", SIZES)
def test_row_groups_are_closed_by_their_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if 256 rows of any size make a group, which Arrow cannot read back from 2 GiB on."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 64 * KB)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 16 * KB)
    samples = samples_of(SIZES[kind])
    write_samples(tmp_path / "d.parquet", samples)
    metadata = pq.ParquetFile(tmp_path / "d.parquet").metadata
    groups, row = [], 0
    for n in range(metadata.num_row_groups):
        groups.append([s.to_row() for s in samples[row : row + metadata.row_group(n).num_rows]])
        row += len(groups[-1])
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        size = sum(row_bytes(one) for one in group)
        assert len(group) == 1 or (size <= 64 * KB and len(group) <= 256)
        assert not following or len(group) == 256 or size + row_bytes(following[0]) > 64 * KB
    assert load_samples(tmp_path / "d.parquet") == samples


@pytest.mark.parametrize("kind", SIZES)
def test_large_groups_of_other_programs_are_read_a_few_rows_at_a_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file that was written in one group is taken into memory whole."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 16 * KB)
    samples = samples_of(SIZES[kind])
    write_table(tmp_path / "d.parquet", samples)
    asked: list[int] = []
    real = pq.ParquetFile.iter_batches

    def watched(self: pq.ParquetFile, batch_size: int, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        asked.append(batch_size)
        return real(self, batch_size, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert load_samples(tmp_path / "d.parquet") == samples
    total = pq.ParquetFile(tmp_path / "d.parquet").metadata.row_group(0).total_byte_size
    mean = total / len(samples)
    assert all(1 <= size <= 16 and (size == 1 or size * mean <= 16 * KB) for size in asked)


def write_table(path: Path, samples: list[Sample], **options: Any) -> None:
    """As another program writes rows: one group, dictionaries of everything."""
    rows = [sample.to_row() for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


@pytest.mark.parametrize("fails_at", [0, 1, 5, 15, 16, 17, 31, 38, 39])
def test_rows_that_do_not_fit_together_are_read_one_by_one(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if rows are lost or read twice where Arrow refuses a batch of several.

    Its refusal of more than 2 GiB is imitated at one row.
    """
    samples = samples_of([KB] * 40)
    write_table(tmp_path / "d.parquet", samples)
    real = pq.ParquetFile.iter_batches

    def limited(self: pq.ParquetFile, batch_size: int, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in real(self, batch_size, **kwargs):
            if batch.num_rows > 1 and start <= fails_at < start + batch.num_rows:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented")
            start += batch.num_rows
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", limited)
    assert load_samples(tmp_path / "d.parquet") == samples


def test_a_row_that_arrow_cannot_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file is written that cannot be read."""
    monkeypatch.setattr(parquet, "LARGEST_ROW", 50 * KB)
    with pytest.raises(ValueError, match=r"d\.parquet: row 2 holds \d+ bytes; a row may hold"):
        write_samples(tmp_path / "d.parquet", samples_of([KB, KB, 60 * KB]))
    assert not (tmp_path / "d.parquet").exists()


@pytest.mark.parametrize("options", [
    {"row_group_size": 1}, {"row_group_size": 7}, {"compression": "zstd"}, {"compression": "gzip"},
    {"compression": "none"}, {"use_dictionary": False}, {"data_page_version": "2.0"},
    {"store_schema": False}, {"version": "1.0"}, {"write_page_checksum": True},
], ids=str)  # fmt: skip
def test_files_of_other_writers_are_read(options: dict[str, Any], tmp_path: Path) -> None:
    """Fails if the way a file was packed decides whether its rows are found."""
    samples = samples_of([3 * KB] * 20 + [0] * 3)
    write_table(tmp_path / "d.parquet", samples, **options)
    assert load_samples(tmp_path / "d.parquet") == samples


def test_equal_pictures_are_read_although_a_dictionary_hides_their_size(tmp_path: Path) -> None:
    """Fails if the bytes of a batch are judged by a dictionary that holds one picture for all."""
    rows = [a_row(images=[{"bytes": picture(900 * KB)}]) for _ in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert pq.ParquetFile(tmp_path / "d.parquet").metadata.row_group(0).total_byte_size < 4000 * KB
    before, held = pa.total_allocated_bytes(), 0
    for _, read in read_rows(tmp_path / "d.parquet"):
        read()
        held = max(held, pa.total_allocated_bytes() - before)
    assert 0 < held < 30_000 * KB  # of 90 MB


REAL = """
import io, json, resource, sys, time
from pathlib import Path
from PIL import Image
from r1v3.data.sample import make_sample
from r1v3.data.schema import load_samples, write_samples
buffer = io.BytesIO()
Image.effect_noise((3000, 3000), 90).save(buffer, "PPM")
image = buffer.getvalue()
samples = [make_sample(question="q", ground_truth="1", data_source="t", index=i, images=[image])
           for i in range(250)]
path = Path(sys.argv[1])
started = time.perf_counter()
write_samples(path, samples)
written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
loaded = load_samples(path)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
equal = all(s.images == [image] and s.index == i for i, s in enumerate(loaded))
print(json.dumps({"rows": len(loaded), "equal": equal, "file": path.stat().st_size,
                  "written": written, "peak": peak, "seconds": time.perf_counter() - started}))
"""


@pytest.mark.slow
def test_250_rows_of_9_mb_are_written_and_read_back(tmp_path: Path) -> None:
    """Fails if a file of more than 2 GiB cannot be read, or takes more than its rows and a map."""
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "d.parquet")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    print(found)
    assert found["rows"] == 250 and found["equal"] and found["file"] > 2_200_000_000
    assert found["written"] < 1_200_000_000 and found["peak"] < 6_000_000_000
