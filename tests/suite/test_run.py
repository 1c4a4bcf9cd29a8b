"""The suite from configuration to tables, with the demo's model on files of 12 rows."""

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r1v3.config import Suite, load
from r1v3.evaluation import policy
from r1v3.http import RequestFailed
from r1v3.rollout.local import LocalSampler
from r1v3.rollout.server_pool import NoServers
from r1v3.suite.answers import Answer, AnswerFile
from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.run import run_suite as run_or_nothing
from r1v3.suite.run import score_suite
from r1v3.suite.tables import Record
from tests.suite.files import choice_rows, encoded, write_all, write_tsv
from tests.suite.servers import StandInServers

ROOT = Path(__file__).resolve().parents[2]


def run_suite(settings: Suite) -> Record:
    record = run_or_nothing(settings)
    assert record is not None
    return record


def config(folder: Path, **changes: Any) -> Suite:
    """The demo's model on the files of `folder`/data."""
    small = {
        "run": str(folder / "run"),
        "data": str(folder / "data"),
        "model": str(ROOT / "assets/tiny-internvl"),
        "threads": 1,
        "modes": ["slow"],
        "samples": 2,
        "decoding.max_tokens": 16,
        "batch_prompts": 4,
        "allow_other_files": True,
        "row_tiles": 1,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**small, **changes}.items()]
    return load(Suite, ROOT / "configs/suite/tiny.yaml", overrides)


def answers_of(folder: Path, key: str) -> Path:
    (found,) = (folder / "run" / "suite" / "tiny").glob(f"{key}.slow.*.jsonl")
    return found


class Asked:
    """The rows that a sampler was asked, batch by batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        complete = LocalSampler.complete

        def counting(sampler: LocalSampler, requests: Any, *args: Any, **kwargs: Any) -> Any:
            if stop_after is not None and len(self.batches) == stop_after:
                raise KeyboardInterrupt
            self.batches.append([str(request.sample.index) for request in requests])
            return complete(sampler, requests, *args, **kwargs)

        monkeypatch.setattr(LocalSampler, "complete", counting)

    @property
    def rows(self) -> list[str]:
        return [row for batch in self.batches for row in batch]


def test_an_interrupted_run_asks_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a resumed run asks again, skips a row, or answers otherwise than an uninterrupted
    one: whole batches, a torn line and further samples."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows())
    settings: dict[str, Any] = {"benchmarks": ["mmstar"]}
    run_suite(config(tmp_path, **settings))
    whole = answers_of(tmp_path, "mmstar").read_bytes()
    answers_of(tmp_path, "mmstar").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = Asked(patch, stop_after=2)
        run_suite(config(tmp_path, **settings))
    assert len(first.rows) == 8
    with monkeypatch.context() as patch:
        second = Asked(patch)
        run_suite(config(tmp_path, **settings))
    assert sorted(first.rows + second.rows, key=int) == [str(i) for i in range(12)]
    assert answers_of(tmp_path, "mmstar").read_bytes() == whole
    # The machine went down within a line: one answer of one row is lost.
    answers_of(tmp_path, "mmstar").write_bytes(whole[:-9])
    with monkeypatch.context() as patch:
        third = Asked(patch)
        run_suite(config(tmp_path, **settings))
    assert len(third.rows) == 1
    assert answers_of(tmp_path, "mmstar").read_bytes() == whole
    with monkeypatch.context() as patch:
        fourth = Asked(patch)
        run_suite(config(tmp_path, samples=3, **settings))
    lines = answers_of(tmp_path, "mmstar").read_bytes()
    assert len(fourth.rows) == 12 and lines.startswith(whole)
    assert len(lines.splitlines()) == 1 + 3 * 12


def test_answers_of_servers_are_kept_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a long answer holds back others, or is lost with what failed; if a resumed run asks
    again; if more requests are under way than allowed; or if the order of arrival changes a score.
    """
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows())
    settings: dict[str, Any] = {"benchmarks": ["mmstar"], "protocol": "kit"}
    built: list[StandInServers] = []
    fails = False

    async def say(row: str, count: int) -> list[str]:
        if row == "3":
            while built[-1].under_way > 1 or len(built[-1].asked) not in (1, 12):
                await asyncio.sleep(0.001)
            if fails:
                raise RequestFailed("too hard", retry=False)
        else:
            while built[-1].under_way < 4 and len(built[-1].asked) < 12:
                await asyncio.sleep(0.001)
        return [f"\n</think>\n\n\\boxed{{{'ABCD'[(int(row) + k) % 4]}}}" for k in range(count)]

    def build(rollout: Any, config: Any, tokenizer: Any, **kwargs: Any) -> StandInServers:
        built.append(StandInServers(config.model, tokenizer, 4, say))
        return built[-1]

    monkeypatch.setattr(policy, "build_sampler", build)
    whole = run_suite(config(tmp_path, **settings))
    assert set(built[0].asked.values()) == {1} and built[0].most == 4
    lines = answers_of(tmp_path, "mmstar").read_bytes().splitlines()
    assert [json.loads(line)["row"] for line in lines[-2:]] == ["3", "3"]
    answers_of(tmp_path, "mmstar").unlink()
    fails = True
    with pytest.raises(NoServers, match="too hard"):
        run_suite(config(tmp_path, **settings))
    assert len(answers_of(tmp_path, "mmstar").read_bytes().splitlines()) == 1 + 2 * 11
    fails = False
    again = run_suite(config(tmp_path, **settings))
    assert built[2].asked == {"3": 1}
    assert sorted(answers_of(tmp_path, "mmstar").read_bytes().splitlines()) == sorted(lines)
    assert again.as_json() == whole.as_json()


def test_other_settings_are_other_answers(tmp_path: Path) -> None:
    """Fails if answers of one seed, length or file are taken for those of another."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows(2))
    folder = tmp_path / "run" / "suite" / "tiny"
    seen: set[Path] = set()
    changes: tuple[dict[str, Any], ...] = ({}, {"seed": 1}, {"decoding.max_tokens": 4})
    for change in changes:
        run_suite(config(tmp_path, benchmarks=["mmstar"], samples=1, **change))
        now = set(folder.glob("*.jsonl"))
        assert len(now - seen) == 1
        seen = now


def test_a_score_of_part_of_the_answers_is_refused(tmp_path: Path) -> None:
    """Fails if a benchmark that was not answered whole has a number."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows(3))
    run_suite(config(tmp_path, benchmarks=["mmstar"]))
    path = answers_of(tmp_path, "mmstar")
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))
    record = score_suite(config(tmp_path, benchmarks=["mmstar"]))
    assert record.scores == {} and "1 of 6 answers" in record.incomplete["mmstar slow"]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"row": 1}', b"\xff", b'{"row":"1","other":2}'])
def test_a_damaged_line_is_named(damage: bytes, tmp_path: Path) -> None:
    """Fails if a broken line in the middle of a file loses the answers behind it silently."""
    answers = AnswerFile(tmp_path, "x", "slow", {})
    answers.append([Answer("1", 0, 5, "a", 1, "stop")])
    with answers.path.open("ab") as file:
        file.write(damage + b"\n")
    with pytest.raises(ValueError, match="line 3 is damaged"):
        list(answers.read())


@pytest.mark.parametrize(
    "text", ["\n", "\u2028", "\x00", "\ud800", '"}', "é", "\r\n", "", "\\", "字"]
)
def test_any_text_is_kept(text: str, tmp_path: Path) -> None:
    """Fails if what a model writes can break the file that its answers are kept in."""
    answers = AnswerFile(tmp_path, "x", "slow", {"seed": 1})
    kept = [Answer("1", k, 5, text, 1, "stop", 0.5) for k in range(2)]
    answers.append(kept)
    assert list(answers.read()) == kept


def test_pairs_two_checkpoints_and_writes_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if modes, gains, differences or files are missing from what a run leaves."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows(4))
    settings: dict[str, Any] = {"benchmarks": ["mmstar"], "modes": ["slow", "nowait"]}
    run_suite(config(tmp_path, name="old", **settings))
    record = run_suite(config(tmp_path, seed=3, compare="old", budgets=[4], **settings))
    assert list(record.scores["mmstar"]) == ["slow", "nowait", "budget-4"]
    assert set(record.gains["mmstar"]) == {"slow", "nowait"}
    assert "budget-4" in next(iter(record.incomplete))
    text = (tmp_path / "run" / "suite" / "tiny" / "scores.md").read_text()
    shown = capsys.readouterr().out
    for wanted in ("70.6", "NOT the published file", "16 tokens at most", "no judge", "over old"):
        assert wanted in text + shown
    # One line of progress for each benchmark and mode, with the time that is left.
    for mode in ("slow", "nowait", "budget-4"):
        assert re.search(rf"^mmstar {mode} \d+/8  \d+:\d\d left", shown, re.M)
    assert "| MMStar | 70.6 |" in text and "MMStar (slow) by category" in text
    kept = json.loads((tmp_path / "run" / "suite" / "tiny" / "scores.json").read_text())
    assert kept["report"] == {"mmstar": pytest.approx(0.706)}
    assert kept["scores"]["mmstar"]["slow"]["score"]["samples"] == 2


def test_predictions_for_the_kit_have_its_columns(tmp_path: Path) -> None:
    """Fails if VLMEvalKit could not read our answers: pictures left in, or thoughts, or a row."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows(3))
    run_suite(config(tmp_path, benchmarks=["mmstar"], protocol="kit", modes=["nothink"]))
    for sample in (0, 1):
        folder = tmp_path / "run" / "suite" / "kit" / f"sample-{sample}" / "tiny-nothink"
        with (folder / "tiny-nothink_MMStar.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, dialect="excel-tab"))
        assert [row["index"] for row in rows] == ["0", "1", "2"]
        assert set(rows[0]) == {"index", "question", *"ABCD", "answer", "category", "prediction"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["mmstr"]}, "did you mean mmstar"),
        ({"benchmarks": ["zzz"]}, "known: mmmu"),
        ({"benchmarks": ["hallusionbench"]}, r"HallusionBench\.tsv is missing"),
        ({"allow_other_files": False}, "allow_other_files"),
        ({"too_long": "error", "decoding.max_tokens": 500}, "mmstar row 0: prompt"),
        ({"data": "elsewhere"}, "holds none of the benchmarks"),
    ],
)
def test_what_cannot_be_run_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Fails if a misspelled benchmark, a missing file or a long row ends in a traceback."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows(1))
    with pytest.raises(ValueError, match=message):
        run_suite(config(tmp_path, **changes))


def test_rows_that_do_not_fit_count_as_not_answered(tmp_path: Path) -> None:
    """Fails if a row that is dropped makes the benchmark smaller, and so the score higher."""
    rows = choice_rows(3)
    rows[1]["question"] = "long " * 400
    write_tsv(tmp_path / "data" / "MMStar.tsv", rows)
    record = run_suite(config(tmp_path, benchmarks=["mmstar"], too_long="drop", protocol="kit"))
    found = record.scores["mmstar"]["slow"]
    assert found.upper < 1  # nothing was said, so that no judge could find it right
    assert found.questions == 3 and found.unfinished >= 1 / 3


def test_special_tokens_and_many_pictures_in_a_row(tmp_path: Path) -> None:
    """Fails if a literal `<image>` ends the run, or the pictures of a row exceed its tiles."""
    rows = choice_rows(2)
    rows[0] |= {"question": "What is <image> or <|im_end|>?", "A": "<img>"}
    rows[1]["image"] = str([encoded(i) for i in range(6)])
    write_tsv(tmp_path / "data" / "MMStar.tsv", rows)
    record = run_suite(
        config(tmp_path, benchmarks=["mmstar"], max_tiles=4, row_tiles=6, too_long="error")
    )
    assert record.scores["mmstar"]["slow"].questions == 2


def test_a_cut_is_what_a_shorter_run_gives(tmp_path: Path) -> None:
    """Fails if figure 9's curve differs from separate runs with the same random numbers."""
    write_tsv(tmp_path / "data" / "MMStar.tsv", choice_rows(6))
    budgets = (1, 3, 5, 8, 12, 15)
    settings: dict[str, Any] = {"benchmarks": ["mmstar"]}
    long = run_suite(config(tmp_path, cuts=budgets, **settings)).scores["mmstar"]
    assert list(long) == ["slow", *(f"cut-{n}" for n in budgets)]
    figure = tmp_path / "run" / "suite" / "tiny" / "figures" / "budgets-mmstar.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    for n in budgets:
        short = run_suite(config(tmp_path, **settings, **{"decoding.max_tokens": n}))
        one, other = long[f"cut-{n}"], short.scores["mmstar"]["slow"]
        assert (one.score, one.tokens, one.unfinished) == (
            other.score,
            other.tokens,
            other.unfinished,
        )
    with pytest.raises(ValueError, match="mode slow"):
        config(tmp_path, cuts=[4], modes=["nothink"])


def test_every_benchmark_is_asked_and_scored(tmp_path: Path) -> None:
    """Fails if a benchmark cannot go from its file to a score."""
    write_all(tmp_path / "data")
    record = run_suite(config(tmp_path, samples=1, **{"decoding.max_tokens": 4}))
    assert set(record.scores) == set(BENCHMARKS) and record.incomplete == {}
    for one in record.scores.values():
        assert 0 <= one["slow"].score.low <= one["slow"].score.high <= one["slow"].upper + 1
    kit = score_suite(config(tmp_path, samples=1, protocol="kit", **{"decoding.max_tokens": 4}))
    assert set(kit.scores) == set(BENCHMARKS)
    written = {path.name for path in (tmp_path / "run" / "suite" / "kit").rglob("*.tsv")}
    names = {one.kit_name for one in BENCHMARKS.values()} - {None}
    assert written == {f"tiny_{name}.tsv" for name in names}


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Fails if kill -9 at any moment costs more than the batch in flight, or changes an answer."""
    write_all(tmp_path / "data")
    whole = config(tmp_path, run=str(tmp_path / "whole"), samples=5)
    run_suite(whole)
    settings = [
        f"run={tmp_path / 'run'}", f"data={tmp_path / 'data'}", "threads=1", "samples=5",
        "modes=[slow]", "decoding.max_tokens=16", "batch_prompts=4", "allow_other_files=true",
    ]  # fmt: skip
    command = [sys.executable, "-m", "r1v3", "suite", "configs/suite/tiny.yaml", *settings]
    folder = tmp_path / "run" / "suite" / "tiny"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for wanted in (1, 3):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while len(list(folder.glob("*.jsonl"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    for path in (tmp_path / "whole" / "suite" / "tiny").glob("*.jsonl"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(folder.glob("*.jsonl"))) == len(BENCHMARKS)
