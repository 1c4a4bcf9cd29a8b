import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import rcParams
from PIL import Image

from r1v3.report import findings as stories
from r1v3.report.figure_style import STYLE
from r1v3.report.findings import findings, headline, stage_sentences, trend
from r1v3.report.page import FIGURES, render_page, write_report
from r1v3.report.run_folder import RunFolder, read_run
from r1v3.report.tables import gain_lines, main_stage, mode_rows, summary_rows
from r1v3.report.transcripts import SHADES, image_data_uri, show_cases

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags and links of a page; complains about tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures at a quarter of their resolution: their look is not what these tests are about."""
    monkeypatch.setattr("r1v3.report.figure_style.DPI", 50)


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def page_without_figures(run_dir: Path) -> str:
    return render_page(read_run(run_dir), [], [])


def test_finished_run_gives_one_self_contained_page(example_run: Path) -> None:
    """A report that needs the network or a script is blank when it is mailed to someone."""
    text = page_of(example_run)
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and page.handlers == []
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text
    assert page.tags.count("figure") == len(FIGURES)
    for link in page.links:
        with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as image:
            image.verify()
    assert "This report is not complete" not in text
    for expected in ("0123abc", "learning_rate: 0.003", "Example CPU", "201.7", "Cold-start SFT"):
        assert expected in text


def test_table_shows_the_numbers_of_the_summary(example_run: Path) -> None:
    summary = json.loads((example_run / "summary.json").read_text())
    score = summary["stages"]["grpo"]["modes"]["slow"]["in_domain"]
    cell = f"{100 * score['accuracy']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    assert f"<td>{cell}</td>" in page_without_figures(example_run)


HOSTILE = '</span></p><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7 * 7 }}'


def test_text_of_the_run_is_never_markup(example_run: Path) -> None:
    """A model that writes HTML could run a script on the reader's machine."""
    for file in (example_run / "transcripts").glob("*.json"):
        entries = json.loads(file.read_text())
        for entry in entries:
            entry |= {key: HOSTILE for key in ("question", "ground_truth", "mode", "response")}
            entry["options"] = [HOSTILE]
            entry["tokens"][3]["text"] = HOSTILE
        file.write_text(json.dumps(entries))
    (example_run / "config.yaml").write_text(HOSTILE)
    selection = json.loads((example_run / "selection.json").read_text()) | {"rule": HOSTILE}
    (example_run / "selection.json").write_text(json.dumps(selection))
    (example_run / "environment.json").write_text(json.dumps({"cpu": HOSTILE, HOSTILE: HOSTILE}))
    summary = json.loads((example_run / "summary.json").read_text())
    summary["stages"][HOSTILE] = summary["stages"]["sft"]
    summary["seconds"][HOSTILE] = 1.0
    (example_run / "summary.json").write_text(json.dumps(summary))
    text = page_without_figures(example_run)
    page = Page(text)
    assert "script" not in page.tags and page.handlers == []
    assert all(link.startswith("data:") for link in page.links)
    assert "&lt;script&gt;alert(1)" in text and "{{ 7 * 7 }}" in text


def test_lone_surrogates_do_not_end_the_report(
    example_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an emoji in a decoded response cannot be written as UTF-8."""
    monkeypatch.setattr("r1v3.report.page.FIGURES", ())
    file = example_run / "transcripts" / "grpo.json"
    entries = json.loads(file.read_text())
    entries[0]["tokens"][0]["text"] = "\ud83d"
    file.write_text(json.dumps(entries))
    assert "GRPO" in page_of(example_run)


def test_empty_folder_gives_a_report_that_says_so(tmp_path: Path) -> None:
    text = page_of(tmp_path)
    Page(text)
    for name in ("summary.json", "metrics/grpo.jsonl", "selection.json", "transcripts"):
        assert f"{name}: no" in text
    assert "did not get as far as measuring" in text and "No figure could be drawn" in text


PARTS = (
    "config.yaml",
    "config/grpo.yaml",
    "environment.json",
    "summary.json",
    "selection.json",
    "metrics/sft.jsonl",
    "metrics/grpo.jsonl",
    "metrics/connector.jsonl",
    "metrics/entropy_histogram_edges.json",
)


@pytest.mark.parametrize("part", PARTS)
def test_missing_part_is_named(example_run: Path, part: str) -> None:
    (example_run / part).unlink()
    run = read_run(example_run)
    assert f"{part}: not written" in run.missing and len(run.missing) == 1
    assert len(findings(run)) == 9


@pytest.mark.parametrize("part", [p for p in PARTS if p.endswith(".json")])
def test_half_written_part_is_named(example_run: Path, part: str) -> None:
    """A run killed while writing leaves half a file, which must not hide the rest."""
    file = example_run / part
    file.write_text(file.read_text()[:-20])
    assert [m.partition(" (")[0] for m in read_run(example_run).missing] == [
        f"{part}: cannot be read"
    ]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("monitor: [", ["config/grpo.yaml: cannot be read"]),
        ("- a list", ["config/grpo.yaml: cannot be read"]),
        ("", ["config/grpo.yaml: cannot be read"]),
        ("monitor: 3", []),
        ("monitor: {high_entropy_nats: much}", []),
    ],
)
def test_a_configuration_of_another_form_does_not_end_the_report(
    example_run: Path, text: str, missing: list[str]
) -> None:
    (example_run / "config" / "grpo.yaml").write_text(text)
    run = read_run(example_run)
    assert [line.partition(" (")[0] for line in run.missing] == missing
    assert run.high_entropy_nats == 6.8


def test_stopped_after_sft_still_tells_what_happened(example_run: Path) -> None:
    for part in ("summary.json", "selection.json", "metrics/grpo.jsonl", "metrics/connector.jsonl"):
        (example_run / part).unlink()
    shutil.rmtree(example_run / "transcripts")
    text = page_of(example_run)
    Page(text)
    assert "120 logged steps" in text and "metrics/grpo.jsonl: not written" in text
    assert text.count("<figure>") == 1


def test_report_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_dir is .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_report_is_replaced_and_leaves_nothing_else_behind(
    example_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1v3.report.page.FIGURES", FIGURES[-1:])
    before = {p.name for p in example_run.iterdir()}
    page_of(example_run)
    page_of(example_run)
    assert {p.name for p in example_run.iterdir()} == before | {"report.html", "figures"}


def with_gain(run: RunFolder, mean: float, low: float, high: float) -> RunFolder:
    run.summary["gain"]["grpo_minus_sft"] |= {"mean": mean, "low": low, "high": high}
    return run


@pytest.mark.parametrize(
    ("mean", "low", "high", "words", "verdict"),
    [
        (0.06, 0.04, 0.08, "raised accuracy by 6.0 points", stories.SAME),
        (-0.06, -0.08, -0.04, "lowered accuracy by 6.0 points", stories.OPPOSITE),
        (0.01, -0.01, 0.03, "cannot be told from no change", stories.UNCLEAR),
    ],
)
def test_headline_follows_the_gain(
    example_run: Path, mean: float, low: float, high: float, words: str, verdict: str
) -> None:
    """A report that always says "raised" would be an advertisement."""
    run = with_gain(read_run(example_run), mean, low, high)
    assert words in headline(run)
    assert findings(run)[0].verdict == verdict


def test_correlation_verdict_follows_the_checkpoints(example_run: Path) -> None:
    run = read_run(example_run)
    for sign, verdict in ((1, stories.SAME), (-1, stories.OPPOSITE)):
        for i, entry in enumerate(run.selection["checkpoints"]):
            entry |= {"critical_entropy": 1 + i, "validation_accuracy": 0.5 + 0.01 * sign * i}
        finding = findings(run)[1]
        assert (finding.verdict, f"{sign:+.2f}" in finding.measured) == (verdict, True)
    run.selection["checkpoints"][0]["validation_accuracy"] = 0.47
    finding = findings(run)[1]
    assert finding.verdict == stories.UNCLEAR and "n = 5 checkpoints" in finding.measured


@pytest.mark.parametrize(
    ("accuracy", "tokens", "verdict"),
    [
        (0.1, 10.0, stories.SAME),
        (0.99, 90.0, stories.OPPOSITE),
        (0.99, 10.0, "fewer tokens, but more accurate"),
        (0.1, 90.0, "less accurate, but not fewer tokens"),
        (0.885, 10.0, "fewer tokens, accuracy not separated"),
    ],
)
def test_nothink_verdict_needs_both_tokens_and_accuracy(
    example_run: Path, accuracy: float, tokens: float, verdict: str
) -> None:
    run = read_run(example_run)
    score = run.summary["stages"]["connector"]["modes"]["nothink"]["in_domain"]
    score |= {"accuracy": accuracy, "low": accuracy - 0.005, "high": accuracy + 0.005}
    score["tokens"] = tokens
    assert findings(run)[3].verdict == verdict


@pytest.mark.parametrize(("vocabulary", "possible"), [(897, False), (898, True), (None, True)])
def test_high_entropy_is_judged_only_where_it_can_occur(
    example_run: Path, vocabulary: int | None, possible: bool
) -> None:
    """exp(6.8) = 897.8 words: below, a share of 0 is arithmetic and not a finding."""
    run = read_run(example_run)
    run.summary["vocabulary"] = vocabulary
    for record in run.grpo:
        record["high_entropy_share"] = 0.001 * record["step"]
    assert findings(run)[7].verdict == (stories.SAME if possible else stories.IMPOSSIBLE)


def test_high_entropy_is_that_of_the_run(example_run: Path) -> None:
    """A run that counts tokens above another threshold was described with the report's 6.8."""
    (example_run / "config" / "grpo.yaml").write_text("monitor: {high_entropy_nats: 2.5}")
    run = read_run(example_run)
    for record in run.grpo:
        record["high_entropy_share"] = 0.001 * record["step"]
    finding = findings(run)[7]
    assert finding.verdict == stories.SAME  # ln(64) = 4.16 nats is more than 2.5
    assert finding.measured.endswith("% of tokens above 2.5 nats")


def test_trend_is_not_read_into_scatter() -> None:
    noise = [(-1.0) ** i for i in range(50)]
    flat, rising = trend(noise), trend([v + 0.2 * i for i, v in enumerate(noise)])
    assert flat is not None and flat.sign == 0
    assert rising is not None and rising.sign == 1 and rising.last - rising.first > 7
    assert trend(noise[:9]) is None


def test_stage_sentences_name_the_better_checkpoint_when_there_is_one(example_run: Path) -> None:
    """Saying that the selected checkpoint is best, whatever the numbers, would be untrue."""
    run = read_run(example_run)
    run.selection["checkpoints"][0]["validation_accuracy"] = 0.991
    told = dict(stage_sentences(run))["Selected checkpoint"]
    assert "the best was step 12 with 99.1 %" in told
    for entry in run.selection["checkpoints"]:
        entry["validation_accuracy"] = 0.5
    assert "no checkpoint had a higher one" in dict(stage_sentences(run))["Selected checkpoint"]


def test_tokens_are_shaded_by_entropy_and_critical_ones_underlined(example_run: Path) -> None:
    run = read_run(example_run)
    tokens = [t for e in run.transcripts.values() for entry in e for t in entry["tokens"]]
    top = max(t["entropy"] for t in tokens)
    cases, darkest = show_cases(run)
    assert darkest == top
    shown = [t for case in cases for answer in case.answers for t in answer.tokens]
    assert len(shown) == len(tokens)
    for token in shown:
        assert token.entropy is not None
        assert token.shade == min(int(SHADES * token.entropy / top), SHADES - 1)
        assert token.critical == (token.text == "Wait ")
    text = page_without_figures(example_run)
    assert re.search(r'<span class="e\d c" title="\d\.\d\d nats">Wait </span>', text)
    assert text.count(' nats">') == len(tokens)


def test_answers_of_all_stages_stand_under_their_question(example_run: Path) -> None:
    cases, _ = show_cases(read_run(example_run))
    assert [[a.stage for a in case.answers] for case in cases] == [["Cold-start SFT", "GRPO"]] * 4
    assert [a.correct for a in cases[0].answers] == [False, True]
    assert cases[0].question == "What is the first digit minus the second? (0)"
    assert all(case.image.startswith("data:image/png") for case in cases)


def test_transcript_without_token_entropies_shows_its_response(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, transcripts={"sft": [{"question": "q", "response": "the answer"}]})
    (case,), darkest = show_cases(run)
    assert darkest == 0.0 and [t.text for t in case.answers[0].tokens] == ["the answer"]
    assert case.answers[0].correct is None and case.image_note == "no image recorded"


def test_images_outside_the_run_are_not_read(example_run: Path, tmp_path: Path) -> None:
    """A transcript could name any file and so carry it into a report that is passed on."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    (example_run / "link.png").symlink_to(secret)
    for name in ("../secret.png", str(secret), "link.png", "images/../../secret.png"):
        assert image_data_uri(example_run, name) == ("", "the image is not in the run folder")


@pytest.mark.parametrize(
    "name", [None, 3, "", "no.png", "broken.png", "images", "a\0b", "x" * 5000]
)
def test_unreadable_images_are_explained(example_run: Path, name: object) -> None:
    (example_run / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    uri, note = image_data_uri(example_run, name)
    assert uri == "" and note


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_transparent_images_are_shown_as_the_model_saw_them(example_run: Path, kind: str) -> None:
    """Fails if a reader sees a black picture where the model saw a drawing on white, or none."""
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(example_run / "clear.png", kind)
    uri, note = image_data_uri(example_run, "clear.png")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.convert("RGB").getcolors() == [(64, (255, 255, 255))] and not note


def test_large_images_are_made_smaller(example_run: Path) -> None:
    Image.new("RGB", (3000, 1500)).save(example_run / "large.png")
    uri, _ = image_data_uri(example_run, "large.png")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (512, 256)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.just(10**400)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:4])
    found = [here]
    for key, inner in items if isinstance(value, dict | list) else ():
        nested = isinstance(inner, dict | list)
        found += paths(inner, (*here, key)) if nested else [(*here, key)]
    return found


@pytest.fixture(scope="module")
def finished(
    finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    root = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("fuzz") / "run"))
    names = ("summary.json", "selection.json", "transcripts/grpo.json", "environment.json")
    return root, {name: (root / name).read_text() for name in names}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_wrong_types_anywhere_never_end_the_report(
    finished: tuple[Path, dict[str, str]], data: st.DataObject
) -> None:
    """Fields of the wrong type count as not measured; they do not raise."""
    root, files = finished
    name = data.draw(st.sampled_from(sorted(files)))
    value = json.loads(files[name])
    places = [p for p in paths(value) if p]
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        inner = value
        try:
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = data.draw(JUNK)
        except (TypeError, KeyError, IndexError):
            continue  # an earlier replacement removed this place
    (root / name).write_text(json.dumps(value))
    try:
        run = read_run(root)
        assert len(findings(run)) == 9 and headline(run)
        stage_sentences(run), summary_rows(run.summary), mode_rows(run.summary)
        gain_lines(run.summary), main_stage(run.summary)
        cases, darkest = show_cases(run)
        Page(render_page(run, [], []))
        assert math.isfinite(darkest) and len(cases) <= 6
    finally:
        (root / name).write_text(files[name])


def test_style_uses_only_settings_that_matplotlib_has() -> None:
    assert set(STYLE) <= set(rcParams)


def test_a_percent_sign_stays_on_the_line_of_its_number(example_run: Path) -> None:
    """Narrow columns once began lines with "%"."""
    text = page_without_figures(example_run)
    assert "SFT 65.4\N{NO-BREAK SPACE}%" in text and "202\N{NO-BREAK SPACE}s." in text
