"""`--resume`: longer runs go on, other experiments are refused, finished ones say so."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r1v3.config import GRPO, SFT, load
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples, write_samples
from r1v3.trainer import grpo, record, sft
from r1v3.trainer.metrics import comparable, read_metrics
from r1v3.trainer.record import NothingToDo, check_resume, data_digest, folder_digest
from r1v3.trainer.stage import begin
from tests.tiny import some_questions
from tests.tiny_run import digest, finished, home, result, write_configs

COMMON = {
    "model": "m",
    "train_data": "t.parquet",
    "validation_data": "v.parquet",
    "optimizer": {"learning_rate": 1e-3},
}
KINDS: dict[str, Any] = {"sft": (SFT, {"epochs": 2}), "grpo": (GRPO, {"steps": 8})}
CHANGING = [
    ("sft", "optimizer.learning_rate=2e-3"),
    ("sft", "optimizer.betas=[0.9, 0.99]"),
    ("sft", "optimizer.schedule=constant"),
    ("sft", "optimizer.warmup_ratio=0.1"),
    ("sft", "batch_size=128"),
    ("sft", "seed=1"),
    ("sft", "modules.vision=false"),
    ("sft", "max_length=100"),
    ("sft", "early_stopping=3"),
    ("sft", "validate_every=7"),
    ("sft", "monitor.words=[Hmm]"),
    ("grpo", "group_size=16"),
    ("grpo", "prompts_per_step=64"),
    ("grpo", "gradient_steps=2"),
    ("grpo", "loss.clip_high=0.28"),
    ("grpo", "loss.kl=k1"),
    ("grpo", "loss.aggregation=token-mean"),
    ("grpo", "decoding.temperature=0.9"),
    ("grpo", "decoding.max_tokens=97"),
    ("grpo", "lengths=[{step: 2, max_tokens: 50}]"),
    ("grpo", "advantage.scale=none"),
    ("grpo", "dynamic_sampling.enabled=true"),
    ("grpo", "rewards.accuracy_weight=0.9"),
    ("grpo", "rewards.verifier_url='http://judge'"),
    ("grpo", "rollout.engine=vllm"),
]
HARMLESS = [
    ("sft", "epochs=3"),
    ("sft", "threads=2"),
    ("sft", "wandb_project=mine"),
    ("sft", "micro_batch_size=8"),
    ("sft", "checkpoint_every=5"),
    ("sft", "train_data=moved/t.parquet"),
    ("sft", "model=moved/m"),
    ("sft", "too_long=drop"),
    ("grpo", "steps=9"),
    ("grpo", "micro_batch_prompts=1"),
    ("grpo", "rewards.verifier_retries=5"),
    ("grpo", "rollout.timeout_seconds=5"),
    ("grpo", "rollout.concurrency=2"),
    ("grpo", "parallel.timeout_seconds=60"),
]


def setting(stage: str, run: Path, *overrides: str) -> Any:
    kind, more = KINDS[stage]
    path = run.parent / f"{stage}.yaml"
    path.write_text(yaml.safe_dump({"run": str(run), **COMMON, **more}))
    return load(kind, path, overrides)


def begun(stage: str, run: Path, *overrides: str, trained: bool = False) -> None:
    """The folder of a stage that was started and has a checkpoint, or a model as well."""
    config = setting(stage, run, *overrides)
    begin(stage, config, run)
    record.write_start(stage, run, {"train_data": "a", "validation_data": "b", "model": "c"})
    (run / "checkpoints" / stage / "step-000002").mkdir(parents=True)
    if trained:
        (run / "models" / stage).mkdir(parents=True)
        record.write_finished(stage, config)


@pytest.mark.parametrize(("stage", "change"), CHANGING)
def test_settings_that_change_the_result_are_refused(
    tmp_path: Path, stage: str, change: str
) -> None:
    """Fails if half a run is of one experiment and half of another."""
    run = tmp_path / "run"
    begun(stage, run)
    key = change.partition("=")[0]
    with pytest.raises(ValueError, match=rf"cannot go on with --resume.*: {key} \S+.* -> "):
        check_resume(stage, setting(stage, run, change), {})


@pytest.mark.parametrize(("stage", "change"), HARMLESS)
def test_settings_that_do_not_change_the_result_may_differ(
    tmp_path: Path, stage: str, change: str
) -> None:
    """Fails if a run cannot go on longer, elsewhere, or with another micro-batch."""
    run = tmp_path / "run"
    begun(stage, run)
    check_resume(stage, setting(stage, run, change), {})


def test_every_difference_is_named(tmp_path: Path) -> None:
    """Fails if the second difference is found only when the first one is put back."""
    run = tmp_path / "run"
    begun("grpo", run)
    other = setting("grpo", run, "seed=3", "loss.clip_low=0.1", "steps=4", "threads=1")
    with pytest.raises(ValueError) as refused:
        check_resume("grpo", other, {"train_data": "x", "validation_data": "b", "model": "y"})
    told = str(refused.value)
    for part in (
        "loss.clip_low 0.2 -> 0.1",
        "seed 0 -> 3",
        "steps 8 -> 4, which can only grow",
        "content of train_data (a -> x)",
        "content of model (c -> y)",
    ):
        assert part in told
    assert "threads" not in told and "validation_data" not in told


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sft.yaml", b""), ("sft.yaml", b"a: ["), ("sft.yaml", b"- a"), ("sft.yaml", b"\xff\xfe"),
        ("sft.yaml", b"a: b: c"), ("sft.yaml", b"run: x\nfrom_a_later_version: 1"),
        ("sft.record.json", b""), ("sft.record.json", b"{"), ("sft.record.json", b"[]"),
        ("sft.record.json", b"\xff"), ("sft.record.json", b"null"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_an_error_that_names_the_file(
    file: str, content: bytes, tmp_path: Path
) -> None:
    """Fails if it ends in a traceback, or the run goes on as if nothing had been recorded."""
    run = tmp_path / "run"
    begun("sft", run)
    (run / "config" / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        check_resume("sft", setting("sft", run), {})


def test_a_judge_may_move_but_not_come_or_go(tmp_path: Path) -> None:
    """Fails if a run cannot outlive its judge's address, or loses its judge unseen."""
    run = tmp_path / "run"
    begun("grpo", run, "rewards.verifier_url='http://a'")
    check_resume("grpo", setting("grpo", run, "rewards.verifier_url='http://b'"), {})
    with pytest.raises(ValueError, match=r"rewards\.verifier_url True -> False"):
        check_resume("grpo", setting("grpo", run), {})


def test_a_stage_that_saved_nothing_may_start_with_anything(tmp_path: Path) -> None:
    """Fails if a first attempt that died of a wrong setting blocks its run folder."""
    begin("sft", setting("sft", tmp_path / "run"), tmp_path / "run")
    check_resume("sft", setting("sft", tmp_path / "run", "seed=9"), {"train_data": "z"})


@pytest.mark.parametrize(("stage", "longer"), [("sft", "epochs=2.5"), ("grpo", "steps=12")])
def test_a_finished_stage_has_nothing_to_do_until_it_may_go_on(
    tmp_path: Path, stage: str, longer: str
) -> None:
    """Fails if a finished stage is trained again, or a longer one is taken to be finished when it
    was killed on its way."""
    run = tmp_path / "run"
    begun(stage, run, trained=True)
    with pytest.raises(NothingToDo, match=rf"^{stage}: nothing to do, .*models/{stage} "):
        check_resume(stage, setting(stage, run), {})
    more = setting(stage, run, longer)
    check_resume(stage, more, {})
    begin(stage, more, run)
    record.write_start(stage, run, {})
    check_resume(stage, more, {})
    with pytest.raises(ValueError, match="can only grow"):
        check_resume(stage, setting(stage, run), {})
    record.write_finished(stage, more)
    with pytest.raises(NothingToDo):
        check_resume(stage, more, {})


def edited(sample: Sample, key: str) -> Sample:
    row = sample.to_row()
    row["images"] = list(sample.images)
    if key == "prompt":
        row["prompt"][-1]["content"] += " "
    elif key == "picture":
        row["images"] = list(some_questions(7)[6].images)
    elif key == "answer":
        row["reward_model"]["ground_truth"] += "0"
    elif key in ("data_source", "ability"):
        row[key] += "x"
    else:
        row["extra_info"][key] = {"index": 77, "options": ["1", "2"]}.get(key, "new")
    return Sample.model_validate(row)


EDITS = ("prompt", "picture", "answer", "data_source", "ability", "index", "options", "response")
EDITS += ("question", "note", "domain", "split")


@pytest.mark.parametrize("edit", [*EDITS, "order", "one fewer", "one twice"])
def test_the_digest_of_data_sees_every_change(edit: str) -> None:
    """Fails if a run goes on with other questions, pictures or answers unseen."""
    samples = some_questions(4)
    changed = {
        "order": [samples[1], samples[0], *samples[2:]],
        "one fewer": samples[:3],
        "one twice": [*samples, samples[0]],
    }.get(edit) or [*samples[:2], edited(samples[2], edit), samples[3]]
    assert data_digest(changed) != data_digest(samples)


def test_the_digest_of_data_is_that_of_its_content(tmp_path: Path) -> None:
    """Fails if a file that was moved or converted is taken to be other data."""
    samples = some_questions(4)
    for name in ("a.parquet", "b.jsonl", "folder/c.parquet"):
        write_samples(tmp_path / name, samples)
        assert data_digest(load_samples(tmp_path / name)) == data_digest(samples)


@pytest.mark.parametrize("limit", [1 << 30, 1000])
def test_the_digest_of_a_model_sees_other_weights(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a stage goes on against another reference policy; large files are read in pieces."""
    monkeypatch.setattr(record, "_WHOLE_FILE", limit)
    monkeypatch.setattr(record, "_PIECE", 64)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(bytes(20_000))
    config.write_text("{}")
    found = {folder_digest(tmp_path)}
    for part in range(10):
        # What training changes: a tensor, here a tenth of the file.
        changed = bytearray(20_000)
        changed[part * 2000 : part * 2000 + 2000] = b"\1" * 2000
        weights.write_bytes(bytes(changed))
        found.add(folder_digest(tmp_path))
    config.write_text("[]")
    found.add(folder_digest(tmp_path))
    assert len(found) == 12
    before = folder_digest(tmp_path)
    (tmp_path / "notes.md").write_text("no part of the model")
    assert folder_digest(tmp_path) == before


def test_grpo_goes_on_for_more_steps_as_if_it_had_not_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if more `steps` are not taken, or take other questions or another optimizer state than
    a run of that length (its schedule is constant), or a finished run does not say so."""
    write_configs(tmp_path)
    own = [f"run={tmp_path / 'run'}", f"model={home() / 'base'}"]

    def go(steps: int, *more: str) -> Path:
        config = load(GRPO, tmp_path / "configs/grpo.yaml", [*own, f"steps={steps}", *more])
        return grpo.train(config, resuming=steps > 2 or bool(more))

    assert go(2) == tmp_path / "run/models/grpo"
    with pytest.warns(UserWarning, match="steps 2 -> 4"):
        go(4)
    whole = result(finished("grpo")[0] / "run", "grpo")
    assert result(tmp_path / "run", "grpo") == whole
    capsys.readouterr()
    assert go(4) == tmp_path / "run/models/grpo"
    said = capsys.readouterr().out
    assert said.startswith("grpo: nothing to do") and said.count("\n") == 1
    with pytest.raises(ValueError, match="optimizer.learning_rate"):
        go(6, "optimizer.learning_rate=0.1")
    assert result(tmp_path / "run", "grpo") == whole


def test_sft_goes_on_for_more_epochs(tmp_path: Path) -> None:
    """Fails if more `epochs` see other rows than a run of that length, or lose the optimizer's
    state."""
    write_configs(tmp_path)
    lines, weights = {}, {}
    for run, epochs in (("longer", (0.25, 0.75)), ("whole", (0.75,))):
        for n, more in enumerate(epochs):
            overrides = [f"run={tmp_path / run}", f"model={home() / 'base'}", f"epochs={more}"]
            overrides += ["batch_size=24", "optimizer.schedule=constant", "validate_every=1"]
            config = load(SFT, tmp_path / "configs/sft.yaml", overrides)
            sft.train(config, resuming=n > 0)
        lines[run] = comparable(read_metrics(tmp_path / run / "metrics/sft.jsonl"))
        weights[run] = digest(tmp_path / run / "models/sft/model.safetensors")
    assert [line["step"] for line in lines["whole"]] == [1, 2, 3]
    assert lines["longer"] == lines["whole"] and weights["longer"] == weights["whole"]
