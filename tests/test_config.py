"""Configuration files: what cannot be run is refused, with the key and the remedy named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r1v3 import config as configuration
from r1v3.config import (
    GRPO,
    SFT,
    STAGES,
    ConfigError,
    Connector,
    Data,
    Distill,
    Evaluate,
    Pictures,
    Section,
    Suite,
    Supervised,
    load,
    to_yaml,
)

FOLDERS: dict[str, type[Section]] = {"suite": Suite, "distill": Distill}


def kind_of(path: Path) -> type[Section]:
    """By name; a file of another name by what it holds."""
    if path.stem in STAGES:
        return STAGES[path.stem]
    if path.parent.name in FOLDERS:
        return FOLDERS[path.parent.name]
    keys = yaml.safe_load(path.read_text())
    if "train_data" not in keys:
        return Data
    return GRPO if "group_size" in keys else SFT


CONFIGS = Path(__file__).parents[1] / "configs"
# Studies are no stages: tests/study plans each of them.
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set((CONFIGS / "studies").rglob("*.yaml")))
STAGE: dict[str, Any] = {
    "run": "runs/x",
    "model": "m",
    "train_data": "{run}/a.parquet",
    "validation_data": "b.parquet",
    "optimizer": {"learning_rate": 1e-3},
}


def written(tmp_path: Path, tree: object, name: str = "c.yaml") -> Path:
    path = tmp_path / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def refused(kind: type[Section], tmp_path: Path, tree: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(kind, written(tmp_path, tree), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_file_of_the_project_loads_and_its_resolved_form_loads_again(
    path: Path, tmp_path: Path
) -> None:
    kind = kind_of(path)
    config = load(kind, path)
    resolved = written(tmp_path, to_yaml(config))
    assert "{run}" not in resolved.read_text()
    assert load(kind, resolved) == config


def test_there_are_files_to_check() -> None:
    assert {p.stem for p in FILES} >= {"data", "sft", "grpo", "connector", "select", "eval"}


def test_an_unknown_key_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    message = refused(SFT, tmp_path, {**STAGE, "batchsize": 3})
    assert message.startswith(str(tmp_path / "c.yaml"))
    assert "unknown key `batchsize` (did you mean `batch_size`?)" in message


def test_an_unknown_nested_key_is_answered_from_its_own_section(tmp_path: Path) -> None:
    tree = {**STAGE, "optimizer": {"learning_rate": 1e-3, "warmup": 0.1}}
    message = refused(SFT, tmp_path, tree)
    assert "`optimizer.warmup` (did you mean `warmup_ratio`?)" in message


def test_an_unknown_key_inside_a_list_is_answered_from_its_item(tmp_path: Path) -> None:
    tree = {**STAGE, "steps": 1, "lengths": [{"step": 0, "max_token": 5}]}
    message = refused(GRPO, tmp_path, tree)
    assert "`lengths.0.max_token` (did you mean `max_tokens`?)" in message
    assert "missing key `lengths.0.max_tokens`" in message


def test_an_unknown_key_in_an_optional_section_is_answered(tmp_path: Path) -> None:
    tree = {**STAGE, "model": None, "architecture": {"patchsize": 8, "tokenizer_data": []}}
    message = refused(SFT, tmp_path, tree)
    assert "`architecture.patchsize` (did you mean `patch_size`?)" in message


def test_a_key_like_no_other_gets_the_list_of_keys(tmp_path: Path) -> None:
    tree = {**STAGE, "modules": {"zzzz": True}}
    assert "(known keys: vision, connector, llm)" in refused(SFT, tmp_path, tree)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    tree = {**STAGE, "seed": "x", "epochs": -1, "nope": 1}
    del tree["train_data"]
    message = refused(SFT, tmp_path, tree)
    for part in ("`seed` = 'x'", "`epochs` = -1", "`nope`", "missing key `train_data`"):
        assert part in message


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path, text: str) -> None:
    """YAML 1.1 takes 1e-5 for a string."""
    whole = yaml.safe_dump(STAGE).replace("learning_rate: 0.001", f"learning_rate: {text}")
    assert load(SFT, written(tmp_path, whole)).optimizer.learning_rate == 1e-5
    changed = load(SFT, written(tmp_path, STAGE), [f"optimizer.learning_rate={text}"])
    assert changed.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize("text", [".nan", ".inf", "nan", "inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, text: str) -> None:
    message = refused(SFT, tmp_path, STAGE, f"optimizer.learning_rate={text}")
    assert "optimizer.learning_rate" in message


def test_overrides_reach_sections_lists_and_nulls(tmp_path: Path) -> None:
    path = written(tmp_path, {**STAGE, "threads": 2, "steps": 9})
    config = load(
        GRPO,
        path,
        [
            "seed=7",
            "decoding.max_tokens=12",
            "threads=null",
            "optimizer.betas=[0.8, 0.9]",
            "lengths=[{step: 3, max_tokens: 20}]",
            "modules.llm=false",
        ],
    )
    assert (config.seed, config.decoding.max_tokens, config.threads) == (7, 12, None)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.lengths[0].max_tokens == 20
    assert config.modules.llm is False and config.modules.vision is True


def test_a_later_override_wins_and_overrides_alone_are_enough() -> None:
    assert load(Data, None, ["run=a", "seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("name", ["nan", "inf", "1e5", "infinity"])
def test_text_that_looks_like_a_number_stays_text_where_text_is_wanted(name: str) -> None:
    assert load(Evaluate, None, ["run=r", f"name={name}", "data=[]"]).name == name


def test_an_override_may_contain_further_equal_signs() -> None:
    assert load(Data, None, ["run=a=b"]).run == Path("a=b")


@pytest.mark.parametrize("override", ["seed", "=3", "run.x=1", "seed={"])
def test_an_override_that_cannot_be_read_is_quoted(tmp_path: Path, override: str) -> None:
    message = refused(SFT, tmp_path, STAGE, override)
    assert repr(override) in message


def test_an_unknown_override_is_answered_like_a_key(tmp_path: Path) -> None:
    assert "`optimiser` (did you mean `optimizer`?)" in refused(
        SFT, tmp_path, STAGE, "optimiser.learning_rate=1"
    )


def test_the_run_folder_is_filled_in_everywhere_also_when_overridden(tmp_path: Path) -> None:
    tree = {
        **STAGE,
        "model": None,
        "architecture": {
            "tokenizer_data": ["{run}/t.parquet", "u"],
            "vision": {"hidden_size": 4},
            "text": {},
        },
    }
    path = written(tmp_path, tree)
    for overrides, run in (([], "runs/x"), (["run=elsewhere"], "elsewhere")):
        config = load(SFT, path, overrides)
        assert config.train_data == Path(run) / "a.parquet"
        assert config.architecture is not None
        assert config.architecture.tokenizer_data == (Path(run) / "t.parquet", Path("u"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold a mapping of keys, not NoneType"),
        ("- 1", "must hold a mapping of keys, not list"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, said: str) -> None:
    message = refused(SFT, tmp_path, text)
    assert said in message and "c.yaml" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.yaml: No such file"):
        load(SFT, tmp_path / "nothing.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00run: x")
    with pytest.raises(ConfigError, match="c.yaml is not valid YAML"):
        load(SFT, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "give either `model`"),
        ({"batch_size": 10, "micro_batch_size": 4}, "batch_size 10 must be a multiple of"),
        ({"engine": "none"}, "`engine` = 'none'"),
        ({"optimizer": {}}, "missing key `optimizer.learning_rate`"),
        ({"optimizer": {"learning_rate": 0}}, "`optimizer.learning_rate` = 0"),
        ({"optimizer": {"learning_rate": 1, "warmup_ratio": 1.5}}, "warmup_ratio` = 1.5"),
        ({"optimizer": 3}, "`optimizer` = 3"),
        ({"modules": {"llm": "maybe"}}, "`modules.llm` = 'maybe'"),
    ],
)
def test_values_that_cannot_be_run_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in refused(SFT, tmp_path, {**STAGE, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "`model` must name the folder"),
        ({"group_size": 1}, "`group_size` = 1"),
        ({"prompts_per_step": 8, "gradient_steps": 3}, "prompts_per_step 8 must be a multiple"),
        ({"loss": {"dual_clip": 1}}, "`loss.dual_clip` = 1"),
        ({"loss": {"kl": "k4"}}, "`loss.kl` = 'k4'"),
        ({"loss": {"ratio_clip": "gspo"}}, "`loss.ratio_clip` = 'gspo'"),
        ({"loss": {"ratio_clip": "cispo", "dual_clip": 3}}, "null with ratio_clip `cispo`"),
        ({"steps": 0}, "`steps` = 0"),
    ],
)
def test_grpo_settings_that_cannot_be_run_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in refused(GRPO, tmp_path, {**STAGE, "steps": 2, **changes})


def test_connector_tuning_trains_the_connector_alone_unless_told_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE)
    assert load(Connector, path).modules.model_dump() == {
        "vision": False,
        "connector": True,
        "llm": False,
    }
    assert load(Supervised, path).modules.llm is True


def test_a_loaded_configuration_cannot_be_changed(tmp_path: Path) -> None:
    """The configuration written into the run folder must stay the one that runs."""
    config = load(SFT, written(tmp_path, STAGE))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_a_configuration_error_is_a_value_error() -> None:
    assert issubclass(configuration.ConfigError, ValueError)


@pytest.mark.parametrize(
    "zero", ["0", "0.0", "-0", "-0.0", "+0.0", "0.000", ".0", "0e0", "0e7", "'0'", "false", "0x0"]
)
def test_grpo_refuses_greedy_completions(tmp_path: Path, zero: str) -> None:
    """Fails if a run samples the same completion G times and trains on none of them."""
    message = refused(GRPO, tmp_path, {**STAGE, "steps": 3}, f"decoding.temperature={zero}")
    assert "decoding.temperature must be above 0" in message


@pytest.mark.parametrize("temperature", ["1e-3", "0.1", "1", "1.0", "2.5"])
def test_grpo_accepts_other_temperatures_and_evaluation_greedy(
    tmp_path: Path, temperature: str
) -> None:
    """Fails if the refusal takes in temperatures that sample, or stages that may be greedy."""
    path = written(tmp_path, {**STAGE, "steps": 3})
    made = load(GRPO, path, [f"decoding.temperature={temperature}"])
    assert made.decoding.temperature == float(temperature)
    assert load(Evaluate, None, ["run=r", "data=[d]", "decoding.temperature=0"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pictures.ground=gray", "`pictures.ground` = 'gray'"),
        ("pictures.truncated=drop", "`pictures.truncated` = 'drop'"),
        ("pictures.back=white", "unknown key `pictures.back`"),
        ("pictures.truncate=skip", "`pictures.truncate` (did you mean `truncated`?)"),
        ("max_tiles=0", "`max_tiles` = 0"),
    ],
)
def test_settings_of_pictures_that_do_not_exist_are_named(
    tmp_path: Path, override: str, said: str
) -> None:
    """Fails if a misspelled choice silently leaves the default."""
    assert said in refused(SFT, tmp_path, STAGE, override)


def test_a_file_from_before_pictures_could_be_set_has_the_safe_defaults(tmp_path: Path) -> None:
    """Fails if an old configuration no longer loads, or trains on truncated pictures."""
    old = load(SFT, written(tmp_path, STAGE))
    assert old.pictures == Pictures(ground="white", truncated="error") and old.max_tiles is None
