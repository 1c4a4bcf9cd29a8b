"""The chat page in a real Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.serve.serving import ROOT, Served, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    one = Browser(tmp_path)
    yield one
    one.process.kill()
    one.process.wait()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_a_chat_about_a_picture(served: Served, browser: Browser, width: int, height: int) -> None:
    """Fails if the page is wider than its window, loads from elsewhere, takes text for markup, or
    does not show the picture, the folded thought, the answer and the heat of the tokens."""
    page = f"http://127.0.0.1:{served.port}/"
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
    browser.call("Page.navigate", url=page)
    until(lambda: browser.run("document.getElementById('model')?.textContent") == "tiny-internvl")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(ROOT / "assets/example.png")])
    until(lambda: browser.run("pictures.length") == 1)
    browser.run(
        "find('mode').value = 'budget'; find('mode').onchange(); find('budget').value = '8';"
        "find('seed').value = '1'; find('text').value = '<b>5</b> Compute the result.';"
        "find('form').requestSubmit()"
    )
    until(lambda: browser.run("running === null && history.length === 2"))
    assert browser.run("document.querySelectorAll('.user img').length") == 1
    assert browser.run("document.querySelectorAll('.turn b').length") == 0
    assert "<b>5</b>" in browser.run("document.querySelector('.user').textContent")
    assert browser.run("document.querySelector('details').open") is False
    assert browser.run("document.querySelector('.thought').textContent").strip()
    answer = browser.run("document.querySelector('.turn:not(.user) > .answer').textContent")
    assert answer == browser.run("history[1].content") not in ("", "…")
    assert browser.run("document.querySelectorAll('.heat span').length") > 8
    colors = "[...document.querySelectorAll('.heat span')].map((s) => s.style.backgroundColor)"
    assert len(set(browser.run(colors))) > 3
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    bottom = "find('send').getBoundingClientRect().bottom <= innerHeight"
    assert browser.run(bottom)
    sent = [e["params"]["request"]["url"] for e in browser.events
            if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
    assert sent and all(url.startswith((page, "data:")) for url in sent)
    loud = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in browser.events if event.get("method") in loud] == []
