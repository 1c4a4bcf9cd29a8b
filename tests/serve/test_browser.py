"""The chat page in a real Chromium, over its debugging pipe."""

import fcntl
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import ROOT, Served, until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


class Browser:
    """One page; messages are JSON between null bytes, on file descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        ours = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (read, write)]

        def connect() -> None:
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        command = [str(CHROMIUM), *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL
        )
        for one in (read, write, *ours):
            os.close(one)
        self._numbers, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._read, 1 << 20)
                assert read, "the browser has ended"
                self._rest += read
            one, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(one)
            if found.get("id") == number:
                assert "error" not in found, found
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


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
