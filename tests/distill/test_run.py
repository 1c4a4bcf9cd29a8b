"""The pipeline against a teacher that fails in every way: nothing lost, nothing repeated."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from r1v3.data.compose import to_png
from r1v3.data.sample import make_sample
from r1v3.data.schema import load_samples, write_samples
from r1v3.distill.languages import _identifier
from r1v3.distill.run import Unfinished, run_distill
from r1v3.distill.work import Unusable
from tests.distill.teacher import (
    FAULTS,
    TIMEOUT_SECONDS,
    Teacher,
    complete,
    config,
    hang,
    question,
    says,
    settings,
    sum_of,
    teaching,
    text_of,
    write_questions,
)
from tests.processes import ROOT, environment

RESULTS = (
    "sft.parquet",
    "sft_validation.parquet",
    "pass_rates.jsonl",
    "counts.json",
    "report.html",
)


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / "distill" / name).read_bytes() for name in RESULTS}


def answers(run: Path) -> list[dict[str, Any]]:
    (file,) = (run / "distill").glob("answers.*.jsonl")
    return [json.loads(line) for line in file.read_bytes().splitlines()[1:]]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve questions, and the folder of a run without any fault."""
    folder = tmp_path_factory.mktemp("healthy")
    questions = write_questions(folder / "questions.parquet", 12)
    with teaching() as teacher:
        account = run_distill(config(folder / "run", teacher.url, questions))
    assert account is not None and account.answers == 24 and account.train > 4
    return questions, folder / "run"


def test_writes_what_sft_reads(healthy: tuple[Path, Path]) -> None:
    """Fails if a row is not its question with a right chain as response, or counts do not add."""
    questions, run = healthy
    asked = {str(sample.index): sample for sample in load_samples(questions)}
    rows = load_samples(run / "distill" / "sft.parquet")
    held_out = load_samples(run / "distill" / "sft_validation.parquet")
    for row in [*rows, *held_out]:
        original = asked[row.extra_info["source_index"]]
        assert row.images == original.images and row.prompt == original.prompt
        assert row.response is not None and row.thinking
        assert row.response.endswith(f"</think>\n\nThe sum is \\boxed{{{original.ground_truth}}}")
        assert "<think>" not in row.response
        assert 0 < row.extra_info["pass_rate"] <= 1
    assert {row.split for row in rows} == {"train"} and len(held_out) == 2
    sources = [row.extra_info["source_index"] for row in [*rows, *held_out]]
    assert len(set(sources)) == len(sources)
    counts = json.loads((run / "distill" / "counts.json").read_text())
    assert counts["written"] == {"train": len(rows), "validation": len(held_out)}
    dropped = counts["passed"] - sum(counts["left_out"].values())
    assert dropped == len(rows) + len(held_out)
    assert sum(of["written"] for of in counts["domains"].values()) == len(rows) + len(held_out)


def test_pass_rates_are_those_of_the_answers(healthy: tuple[Path, Path]) -> None:
    """Fails if curriculum or dynamic sampling would read another rate than the teacher had."""
    questions, run = healthy
    lines = (run / "distill" / "pass_rates.jsonl").read_text().splitlines()
    found = {line["index"]: line for line in map(json.loads, lines)}
    right: dict[str, int] = {}
    for answer in answers(run):
        right.setdefault(answer["row"], 0)
    for sample in load_samples(questions):
        line = found[sample.index]
        said = [one["content"] for one in answers(run) if one["row"] == line["id"]]
        correct = sum(f"{{{sample.ground_truth}}}" in text for text in said)
        assert (line["right"], line["answers"]) == (correct, 2)
        assert line["pass_rate"] == correct / 2 and line["data_source"] == "tests/sums"


def test_every_fault_is_survived(healthy: tuple[Path, Path], tmp_path: Path) -> None:
    """Fails if a fault of the teacher loses an answer, repeats one, or changes the results."""
    questions, run = healthy
    with teaching() as teacher:
        teacher.faults.extend(FAULTS.values())
        run_distill(config(tmp_path / "run", teacher.url, questions))
    kept = [(one["row"], one["sample"]) for one in answers(tmp_path / "run")]
    assert len(kept) == len(set(kept)) == 24
    assert set(teacher.answered.values()) == {1} and len(teacher.answered) == 24
    assert results(tmp_path / "run") == results(run)


def test_a_teacher_that_does_not_answer_in_time_is_asked_again(
    healthy: tuple[Path, Path], tmp_path: Path
) -> None:
    """Fails if a time-out loses an answer, or a late one is kept twice."""
    questions, run = healthy
    # On a busy machine a healthy teacher may be late as well: there are tries enough.
    slow = {"timeout_seconds": TIMEOUT_SECONDS, "retries": 10_000}
    with teaching() as teacher:
        teacher.faults.extend([hang] * 3)
        run_distill(config(tmp_path / "run", teacher.url, questions, teacher=slow))
    kept = [(one["row"], one["sample"]) for one in answers(tmp_path / "run")]
    assert len(kept) == len(set(kept)) == 24 and teacher.asked.total() >= 27
    assert results(tmp_path / "run") == results(run)


def test_a_second_run_asks_nothing(healthy: tuple[Path, Path]) -> None:
    """Fails if going through the results again costs a request, or changes them."""
    questions, run = healthy
    before = results(run)
    run_distill(config(run, "http://127.0.0.1:9/v1", questions))
    assert results(run) == before


def test_what_fails_for_good_is_named_and_asked_again(
    healthy: tuple[Path, Path], tmp_path: Path
) -> None:
    """Fails if answers that could not be had are silently left out, or never asked again."""
    questions, run = healthy
    settled = {"teacher": {"retries": 0}}
    with teaching() as teacher:
        teacher.faults.extend([says(b"oops", 500), says(b"no", 502)])
        with pytest.raises(Unfinished, match="2 of 24 answers are missing .*http 500: oops: 1"):
            run_distill(config(tmp_path / "run", teacher.url, questions, **settled))
        account = run_distill(
            config(tmp_path / "run", teacher.url, questions, **settled), build_only=True
        )
        assert account is not None and (account.answers, account.missing) == (22, 2)
        assert teacher.asked.total() == 24
        run_distill(config(tmp_path / "run", teacher.url, questions, **settled))
        assert teacher.asked.total() == 26
    assert results(tmp_path / "run") == results(run)


def test_more_answers_ask_only_the_new_ones(healthy: tuple[Path, Path], tmp_path: Path) -> None:
    """Fails if raising `answers` throws away, or asks again, what is there."""
    questions, _ = healthy
    with teaching() as teacher:
        run_distill(config(tmp_path / "run", teacher.url, questions, teacher={"answers": 1}))
        assert teacher.asked.total() == 12
        account = run_distill(config(tmp_path / "run", teacher.url, questions))
        assert teacher.asked.total() == 24 and set(teacher.asked.values()) == {1}
        fewer = run_distill(
            config(tmp_path / "run", teacher.url, questions, teacher={"answers": 1})
        )
    assert account is not None and account.answers == 24
    assert fewer is not None and fewer.answers == 12


def start(folder: Path, **changes: Any) -> "subprocess.Popen[bytes]":
    file = folder / "distill.yaml"
    file.write_text(yaml.safe_dump(changes))
    extra = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = os.pathsep.join([str(ROOT), *extra])
    return subprocess.Popen(
        [sys.executable, "-m", "r1v3", "distill", str(file)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_after(process: "subprocess.Popen[bytes]", teacher: Teacher, answered: int) -> None:
    while teacher.answered.total() < answered:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def slowly(body: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.03)
    return complete(body)


@pytest.mark.parametrize(
    "kills", [(5,), pytest.param((1, 3, 9, 14, 20), marks=pytest.mark.slow)], ids=["once", "often"]
)
def test_a_killed_run_ends_in_the_same_bytes(
    kills: tuple[int, ...], healthy: tuple[Path, Path], tmp_path: Path
) -> None:
    """Fails if kill -9 loses an answer that came, asks a kept one again, or changes the results."""
    questions, run = healthy
    with teaching(slowly) as teacher:
        tree = settings(tmp_path / "run", teacher.url, questions, teacher={"concurrency": 2})
        for answered in kills:
            kill_after(start(tmp_path, **tree), teacher, answered)
        # What a killed process had in flight may have been answered, and not have been kept.
        unkept = 2 * len(kills)
        (file,) = (tmp_path / "run" / "distill").glob("answers.*.jsonl")
        with file.open("ab") as torn:
            torn.write(b'{"row": "half a li')
        run_distill(config(tmp_path / "run", teacher.url, questions))
    kept = [(one["row"], one["sample"]) for one in answers(tmp_path / "run")]
    assert len(kept) == len(set(kept)) == 24
    assert 24 <= teacher.answered.total() <= 24 + unkept
    assert results(tmp_path / "run") == results(run)


def test_a_server_that_is_killed_ends_the_run_and_costs_nothing(
    healthy: tuple[Path, Path], tmp_path: Path
) -> None:
    """Fails if a dead server makes a run hang, or lose what it had answered."""
    questions, run = healthy
    changes = {"teacher": {"retries": 1, "concurrency": 1}}

    def dies(teacher: Teacher, handler: Any, body: dict[str, Any]) -> None:
        teacher.http.socket.close()
        handler.close_connection = True
        handler.connection.close()
        raise OSError("killed")

    teacher = Teacher()
    try:
        teacher.faults.extend([lambda t, h, b: t.answer(h, b)] * 7 + [dies])
        with pytest.raises((Unusable, Unfinished), match="connection"):
            run_distill(config(tmp_path / "run", teacher.url, questions, **changes))
    finally:
        teacher.http.shutdown()
    assert len(answers(tmp_path / "run")) == 7
    with teaching() as again:
        run_distill(config(tmp_path / "run", again.url, questions, **changes))
        assert again.asked.total() == 17
    assert results(tmp_path / "run") == results(run)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_at_once(
    status: int, healthy: tuple[Path, Path], tmp_path: Path
) -> None:
    """Fails if thousands of requests are sent with a key that is refused."""
    questions, _ = healthy
    with teaching() as teacher:
        teacher.faults.extend([says(b"no such model", status)] * 24)
        with pytest.raises(Unusable, match=f"http {status}: no such model"):
            run_distill(config(tmp_path / "run", teacher.url, questions))
        assert teacher.asked.total() <= 8


def test_a_refused_question_is_kept_and_a_refusing_teacher_is_not_believed(
    tmp_path: Path,
) -> None:
    """Fails if a question that is too long stops the run, or a wrong setting, which the teacher
    refuses every time, is taken for a fault of all questions."""
    questions = write_questions(tmp_path / "questions.parquet", 12)

    def picky(teacher: Teacher, handler: Any, body: dict[str, Any]) -> None:
        if sum_of(text_of(body))[0] == 3:
            says(b"prompt too long", 400)(teacher, handler, body)
        else:
            teacher.answer(handler, body)

    with teaching() as teacher:
        teacher.faults.extend([picky] * 24)
        account = run_distill(config(tmp_path / "run", teacher.url, questions))
        assert account is not None and account.caught["refused"] == 2
        assert account.answers == 24 and len(account.pass_rates) == 11
        assert teacher.asked.total() == 24
        teacher.faults.extend([says(b"temperature must be 1", 400)] * 24)
        with pytest.raises(Unusable, match="temperature must be 1"):
            run_distill(config(tmp_path / "other", teacher.url, questions))
    assert not list((tmp_path / "other" / "distill").glob("answers.*"))


def test_what_is_missing_is_said_before_the_teacher_is_asked(
    healthy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a missing key of the scorer, or a missing library, is found after the money is
    spent."""
    questions, _ = healthy
    with teaching() as teacher:
        scorer = {"url": teacher.url, "api_key_env": "NO_SUCH_KEY"}
        with pytest.raises(ValueError, match="NO_SUCH_KEY"):
            run_distill(config(tmp_path / "run", teacher.url, questions, scorer=scorer))
        monkeypatch.setitem(sys.modules, "py3langid.langid", None)
        _identifier.cache_clear()
        with pytest.raises(ImportError, match=r"r1v3\[distill\]"):
            run_distill(config(tmp_path / "run", teacher.url, questions))
        assert teacher.asked.total() == 0


def test_two_runs_do_not_share_a_folder(healthy: tuple[Path, Path], tmp_path: Path) -> None:
    """Fails if two processes ask, and pay for, the same questions."""
    questions, _ = healthy

    def nested(body: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(ValueError, match="another r1v3 distill is at work"):
            run_distill(config(tmp_path / "run", "http://127.0.0.1:9/v1", questions))
        return complete(body)

    with teaching(nested) as teacher:
        run_distill(config(tmp_path / "run", teacher.url, questions, limit=1))
        assert teacher.answered.total() == 2


def test_estimate_asks_nothing(
    healthy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the estimate is wrong, costs a request, or ignores what was measured."""
    questions, _ = healthy
    priced = {
        "price_prompt": 2.0, "price_completion": 10.0, "expect_prompt_tokens": 500,
        "expect_tokens": 1000, "requests_per_minute": 6, "tokens_per_minute": 18_000,
    }  # fmt: skip
    before = config(tmp_path / "run", "http://127.0.0.1:9/v1", questions, teacher=priced)
    assert run_distill(before, estimate_only=True) is None
    told = capsys.readouterr().out
    assert "24 answers to 12 questions, about 500 tokens in and 1,000 out" in told
    assert f"cost about {24 * (500 * 2 + 1000 * 10) / 1e6:.2f}" in told and "4:00" in told
    with teaching() as teacher:
        run_distill(config(tmp_path / "run", teacher.url, questions))
    more = {**priced, "answers": 3}
    capsys.readouterr()
    after = config(tmp_path / "run", "http://127.0.0.1:9/v1", questions, teacher=more)
    run_distill(after, estimate_only=True)
    told = capsys.readouterr().out
    assert "12 answers to 12 questions, about 100 tokens in" in told and "mean of 24" in told


def test_duplicates_and_evaluation_sets_are_left_out(tmp_path: Path) -> None:
    """Fails if money is spent on a question twice, or a test question is trained on."""
    longer = "Anna has 31 apples and gets 11 more from her friend Tom. What is 31 + 11?"
    rows = [
        question(1),
        question(2),
        question(1),  # the same row
        make_sample(
            question=question(2).question.replace("shows a", "shows  a"), ground_truth="7",
            data_source="other", index=5, images=question(2).images,
        ),
        make_sample(  # the same text, another picture
            question=question(2).question, ground_truth="7", data_source="other", index=6,
            images=question(3).images,
        ),
        make_sample(question=longer, ground_truth="42", data_source="other", index=7),
        make_sample(
            question=longer.replace("her friend", "his friend"), ground_truth="42",
            data_source="other", index=8,
        ),
        make_sample(  # other numbers: another question
            question=longer.replace("31", "35"), ground_truth="46", data_source="other", index=9
        ),
        question(4),
        make_sample(question="Say <img> 3 + 4", ground_truth="7", data_source="o", index=10),
    ]  # fmt: skip
    write_samples(tmp_path / "questions.parquet", rows)
    write_samples(
        tmp_path / "test.parquet",
        [
            make_sample(
                question=question(4).question.upper(), ground_truth="1", data_source="test",
                index=1, images=question(4).images,
            )
        ],
    )  # fmt: skip
    with teaching() as teacher:
        account = run_distill(
            config(
                tmp_path / "run",
                teacher.url,
                tmp_path / "questions.parquet",
                duplicates={"evaluation": [str(tmp_path / "test.parquet")]},
            )
        )
    assert account is not None
    assert dict(account.survey.dropped) == {
        "repeated row": 1,
        "near-duplicate": 2,
        "contaminated": 1,
        "special token": 1,
    }
    assert [q.index for q in account.survey.questions] == [1, 2, 6, 7, 9]
    assert account.survey.examples["contaminated"][0][1] == "test.parquet 1"
    assert teacher.asked.total() == 10


def test_a_damaged_journal_is_named(healthy: tuple[Path, Path], tmp_path: Path) -> None:
    """Fails if a line that somebody damaged loses the answers behind it silently."""
    questions, _ = healthy
    with teaching() as teacher:
        run_distill(config(tmp_path / "run", teacher.url, questions, limit=2))
    (file,) = (tmp_path / "run" / "distill").glob("answers.*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    for damage in (b"{\n", b'{"row": 3, "sample": 0}\n'):
        file.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(ValueError, match="line 3"):
            run_distill(config(tmp_path / "run", "http://127.0.0.1:9/v1", questions, limit=2))


def test_a_picture_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    """Fails if one broken file ends a run of thousands, or is sent."""
    whole = question(1)
    broken = make_sample(
        question="What is 1 + 2?", ground_truth="3", data_source="x", index=2,
        images=[whole.images[0][:-40]],
    )  # fmt: skip
    write_samples(tmp_path / "questions.parquet", [whole, broken])
    with teaching() as teacher:
        account = run_distill(config(tmp_path / "run", teacher.url, tmp_path / "questions.parquet"))
    assert account is not None and account.survey.dropped["unreadable picture"] == 1
    assert teacher.asked.total() == 2


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; a mapped file's pages can be dropped at any time."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) << 10 if lines else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_twenty_thousand_questions_take_bounded_memory(tmp_path: Path) -> None:
    """Fails if pictures are held: 500 MB of them, which are 670 MB as requests."""
    count, largest = 20_000, 450 << 20
    noise = np.random.default_rng(0)
    pictures = tmp_path / "rows.jsonl"
    row = question(0).to_row()
    with pictures.open("w") as file:
        for n in range(count):
            text = f"Picture {n} shows a sum. What is {n} + {n % 89}?"
            pixels = noise.integers(0, 255, (91, 91, 3), dtype=np.uint8)
            row |= {
                "prompt": [{"role": "user", "content": f"<image>{text}"}],
                "images": [{"bytes": base64.b64encode(to_png(pixels)).decode()}],
                "reward_model": {"style": "rule", "ground_truth": str(n + n % 89)},
                "extra_info": {"index": n, "question": text},
            }
            file.write(json.dumps(row) + "\n")
    assert pictures.stat().st_size > 600 << 20
    with teaching() as teacher:
        tree = settings(tmp_path / "run", teacher.url, pictures, teacher={"answers": 1})
        process = start(tmp_path, **tree)
        most = 0
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(0.05)
        assert process.returncode == 0
        assert teacher.asked.total() == count
    counts = json.loads((tmp_path / "run" / "distill" / "counts.json").read_text())
    assert counts["answers"] == count and counts["written"]["train"] > count // 2
    assert most < largest, f"{most >> 20} MiB"
