"""The page of a run: whole, escaped, and usable in a real browser at two widths."""

import re
from pathlib import Path
from typing import Any

import pytest

from r1v3.config import Distill
from r1v3.distill.account import Account, domain_rows
from r1v3.distill.figure import distribution_figure
from r1v3.distill.page import MEANINGS, SURVEY_MEANINGS, write_page
from r1v3.distill.run import run_distill
from r1v3.distill.samples import MOST_CHARACTERS, ShownChain
from r1v3.distill.survey import DROPPED
from tests.browser import CHROMIUM, Browser
from tests.distill.teacher import complete, config, teaching, write_questions

HOSTILE = "</p><script>alert(1)</script>{{ 7 * 7 }}\ud83d"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distill, Account]:
    folder = tmp_path_factory.mktemp("page")
    questions = write_questions(folder / "questions.parquet", 12)

    def long_and_hostile(body: dict[str, Any]) -> dict[str, Any]:
        reply = complete(body)
        message = reply["choices"][0]["message"]
        if message.get("reasoning_content"):
            message["reasoning_content"] += HOSTILE.replace("\ud83d", "")
        return reply

    with teaching(long_and_hostile) as teacher:
        asked = config(folder / "run", teacher.url, questions, samples=2)
        account = run_distill(asked)
    assert account is not None
    return asked, account


def test_the_page_shows_what_was_kept_and_dropped(run: tuple[Distill, Account]) -> None:
    """Fails if a filter that caught something is missing, or text of a model becomes markup."""
    asked, account = run
    text = (asked.run / "distill" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "{{ 7 * 7 }}" in text
    for name, caught, _, _ in account.filters():
        assert (f"<td>{name}</td>" in text) is (caught > 0), name
        assert (f"<summary>{name} (" in text) is (caught > 0), name
    assert f"{account.train + account.validation:,} chains of thought" in text
    assert text.count('class="case"') >= 4 and text.count("data:image/png") >= 4
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert sources and all(source.startswith("data:") for source in sources)
    kept = text.partition("<h3>Kept</h3>")[2].partition("<details>")[0]
    assert 'class="wrong"' not in kept and 'class="right"' in kept


def test_every_reason_has_a_meaning(run: tuple[Distill, Account]) -> None:
    """Fails if a reason is shown that nobody explains."""
    assert {name for name, *_ in run[1].filters()} <= MEANINGS.keys()
    assert set(DROPPED) == SURVEY_MEANINGS.keys() and all(MEANINGS.values())


def test_a_lone_surrogate_does_not_end_the_page(
    run: tuple[Distill, Account], tmp_path: Path
) -> None:
    """Fails if half an emoji, which a model may write, costs the whole account."""
    asked, account = run
    one = ShownChain("kept", HOSTILE, HOSTILE, "a", (), HOSTILE, HOSTILE, "right", "1 of 2", ())
    page = write_page(tmp_path / "page.html", asked, account, None, [one])
    assert "&lt;script&gt;" in page.read_text(encoding="utf-8")


def test_the_figure_shows_domains_and_pass_rates(
    run: tuple[Distill, Account], tmp_path: Path
) -> None:
    """Fails if the distribution is not drawn, or many domains are drawn into one another."""
    _, account = run
    file = distribution_figure(account, tmp_path / "distribution.png")
    assert file is not None and file.read_bytes().startswith(b"\x89PNG")
    assert domain_rows(account) == [("addition", 8, account.domains["addition"]["written"]),
                                    ("sums", 4, account.domains["sums"]["written"])]  # fmt: skip
    many = Account(account.survey, account.measured, 2)
    for n in range(30):
        many.domains[f"domain {n}"] = type(account.caught)({"questions": n, "written": 1})
    rows = domain_rows(many)
    assert len(rows) == 12 and rows[0] == ("domain 29", 29, 1)
    assert rows[-1] == ("19 others", sum(range(19)), 19)
    assert distribution_figure(many, tmp_path / "none.png") is None


def test_long_chains_are_shortened_in_the_middle() -> None:
    """Fails if a page of long chains cannot be opened, or hides how a chain ends."""
    from r1v3.distill.samples import _short

    text = "".join(str(n % 10) for n in range(10 * MOST_CHARACTERS))
    short = _short(text)
    assert len(short) < MOST_CHARACTERS + 100 and short[:9] == text[:9] and short[-9:] == text[-9:]
    assert _short("short") == "short"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_page_in_a_browser(
    run: tuple[Distill, Account], width: int, height: int, tmp_path: Path
) -> None:
    """Fails if the page is wider than its window, loads from elsewhere, or logs an error."""
    asked, _ = run
    browser = Browser(tmp_path)
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        browser.events.clear()
        page = (asked.run / "distill" / "report.html").as_uri()
        browser.call("Page.navigate", url=page)
        while browser.run("document.readyState") != "complete" or not browser.run("document.title"):
            pass
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("[...document.images].every((i) => i.naturalWidth > 0)")
        sent = [e["params"]["request"]["url"] for e in browser.events
                if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        assert sent and all(url == page or url.startswith("data:") for url in sent)
        loud = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        assert [event for event in browser.events if event.get("method") in loud] == []
    finally:
        browser.process.kill()
        browser.process.wait()
