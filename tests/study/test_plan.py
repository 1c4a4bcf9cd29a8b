"""The runs of a study: each once, named by all that it depends on; and the shipped files."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r1v3.config import ConfigError, Study
from r1v3.config.loading import checked
from r1v3.study.file import read_study
from r1v3.study.plan import make_plan
from tests.study.written import TREE, finding, planned

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/studies").glob("*/*.yaml"))


def changed(path: str, value: Any) -> dict[str, Any]:
    """`TREE` with one value at a dotted path."""
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    *parts, last = path.split("/")
    node = tree
    for part in parts:
        node = node.setdefault(part, {})
    node[last] = value
    return tree


def test_arms_share_what_they_do_not_change() -> None:
    """Fails if an ancestor of several arms would be run for each of them, or an arm's own run for
    all: here both seeds have one data and one sft run, and two of everything after them."""
    plan = planned()
    verbs = sorted(run.verb for run in plan.runs.values())
    assert verbs == ["data"] * 2 + ["eval"] * 4 + ["grpo"] * 4 + ["sft"] * 2
    assert plan.run("default", 0, "sft") is plan.run("hot", 0, "sft")
    hot = plan.run("hot", 1, "grpo")
    assert (hot.config.optimizer.learning_rate, hot.config.seed) == (0.01, 1)
    assert hot.config.model == plan.run("hot", 1, "sft").folder / "models" / "sft"
    order = list(plan.runs)
    assert all(order.index(need) < order.index(k) for k, r in plan.runs.items() for need in r.needs)


def test_a_run_is_named_by_what_it_depends_on_and_nothing_else() -> None:
    """Fails if results of other settings, of another ancestor or another base model would be taken
    for those of a run, or if a run cannot be found again elsewhere or by another study."""
    first = planned()
    key = first.run("default", 0, "score").key
    assert planned(title="Another", arms={"default": {}}).run("default", 0, "score").key == key
    elsewhere = make_plan("x", checked(Study, TREE, "x"), Path("far/away"))
    assert elsewhere.run("default", 0, "score").key == key
    for path, value in (
        ("stages/score/settings/samples", 3),
        ("stages/sft/settings/epochs", 1.0),
        ("stages/data/settings/grpo", 5),
    ):
        other = make_plan("x", checked(Study, changed(path, value), "x"), Path("out"))
        assert other.run("default", 0, "score").key != key, path
    Path("base").mkdir()
    (Path("base") / "config.json").write_text("{}")
    assert planned().run("default", 0, "score").key != key


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("stages/score/settings", {"data": ["{data}/d.parquet"]}, "model is {run}/models/grpo"),
        ("stages/data/settings/run", "{score}", "in a circle"),
        ("stages/sft/settings/epoch", 3, "did you mean `epochs`"),
        ("measure", ["scores"], "no stage 'scores'"),
        ("arms/hot", {"grpoo": {}}, "no stage 'grpoo'"),
        ("arms", {"default": {}, "x": {"score": {"samples": "many"}}}, "`samples` = 'many'"),
        ("seeds", [1, 1], "must differ"),
        ("seeds", [], "at least 1 item"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(path: str, value: Any, wanted: str) -> None:
    """Fails if a mistake in a study's file shows only after hours, or as a traceback."""
    with pytest.raises(ConfigError, match=wanted.replace("{", r"\{").replace("}", r"\}")):
        make_plan("x", checked(Study, changed(path, value), "x.yaml"), Path("out"))


def test_a_stage_with_steps_runs_for_each_checkpoint() -> None:
    """Fails if checkpoints are not scored one by one, each from its own folder."""
    tree = changed("stages/score/steps", [3, 12])
    tree["stages"]["score"]["settings"]["model"] = "{grpo}/checkpoints/grpo/{step}"
    plan = make_plan("x", checked(Study, tree, "x"), Path("out"))
    run = plan.run("hot", 1, "score@12")
    assert run.config.model == plan.run("hot", 1, "grpo").folder / "checkpoints/grpo/step-000012"
    assert {place.stage for place in plan.places if "score" in place.stage} == {
        "score@3",
        "score@12",
    }


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"this": {"stage": "score", "arm": "cold"}}, "no arm 'cold'"),
        ({"this": {"stage": "grpo"}}, "compares answers with metrics"),
        ({"expect": "equal"}, "`margin` is needed"),
        ({"margin": 0.1}, "`margin` is needed"),
        ({"than": {"stage": "score", "part": [0.5, 0.5]}}, "must begin before it ends"),
    ],
)
def test_a_wrong_finding_is_refused(changes: dict[str, Any], wanted: str) -> None:
    """Fails if a finding that cannot be judged is found out only after its runs."""
    with pytest.raises(ConfigError, match=wanted):
        planned(findings=[finding(**changes)])


def test_answers_to_different_questions_are_not_paired() -> None:
    """Fails if two arms that were asked different questions would be compared row by row."""
    arms = {"default": {}, "hot": {"score": {"data": ["other.parquet"]}}}
    with pytest.raises(ConfigError, match="different questions"):
        planned(arms=arms, findings=[finding()])


def test_files_extend_others_and_have_a_quick_form(folder: Path) -> None:
    """Fails if the quick form changed the full one, or a study lost what it extends."""
    below = {key: TREE[key] for key in ("seeds", "stages")}
    below["quick"] = {"seeds": [5], "stages": {"grpo": {"settings": {"steps": 2}}}}
    (folder / "below.yaml").write_text(yaml.safe_dump(below))
    above = {key: TREE[key] for key in ("title", "report", "arms", "measure")}
    above |= {"extends": "below.yaml", "quick": {"stages": {"grpo": {"settings": {"seed": 7}}}}}
    (folder / "above.yaml").write_text(yaml.safe_dump(above))
    full = read_study(folder / "above.yaml", quick=False)
    assert full.seeds == (0, 1) and "steps" not in full.stages["grpo"].settings
    quick = read_study(folder / "above.yaml", quick=True)
    assert quick.seeds == (5,) and quick.arms == full.arms
    assert quick.stages["grpo"].settings == full.stages["grpo"].settings | {"steps": 2, "seed": 7}


def test_a_file_may_extend_several_but_not_itself(folder: Path) -> None:
    """Fails if the 38B's stages do not replace the demo's below a study's arms, or two files that
    name each other are read for ever."""
    (folder / "one.yaml").write_text(yaml.safe_dump(TREE))
    other = {"stages": {"sft": {"settings": {"epochs": 9}}}, "seeds": [3]}
    (folder / "two.yaml").write_text(yaml.safe_dump(other))
    (folder / "both.yaml").write_text("extends: [one.yaml, two.yaml]\ntitle: Both\n")
    both = read_study(folder / "both.yaml", quick=False)
    assert (both.title, both.seeds, both.measure) == ("Both", (3,), ("score",))
    assert both.stages["sft"].settings["epochs"] == 9
    assert both.stages["sft"].settings["train_data"] == "{data}/data/a.parquet"
    (folder / "two.yaml").write_text("extends: both.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_study(folder / "both.yaml", quick=False)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_study_can_be_planned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a study names a setting, a stage or an arm that does not exist, or has an arm
    that nothing tells from another one."""
    monkeypatch.chdir(ROOT)
    plan = make_plan(file.stem, read_study(file, quick=True), Path("out"))
    runs = {arm: frozenset(k for p, k in plan.places.items() if p.arm == arm)
            for arm in plan.study.arms}  # fmt: skip
    assert len(set(runs.values())) == len(plan.study.arms)
    assert plan.study.figures
    assert plan.study.findings or plan.study.correlations
