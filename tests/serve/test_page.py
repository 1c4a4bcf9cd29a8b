"""The chat page, and the guide to vLLM."""

import json
import re
import shlex
import shutil
from pathlib import Path

from r1v3.config import Serve, load
from r1v3.data.tokenizer import load_tokenizer
from r1v3.serve.app import PAGE
from r1v3.serve.schema import ChatRequest
from r1v3.serve.vllm import vllm_bodies, vllm_command, vllm_guide
from tests.serve.serving import MODEL, Served

FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    """Fails if the page loads something from the network, or could be made to."""
    for path, kind in FILES.items():
        reply = served.client.get(path)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert not re.search(r"https?:|//\w|@import|url\(", reply.text.replace("// ", ""))
    assert {path.name for path in PAGE.iterdir()} == {"index.html", "page.css", "page.js"}


def test_text_never_becomes_markup() -> None:
    """Fails if an answer or a file name can put elements or code into the page."""
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|style=|<script>", page)


def test_the_page_finds_its_elements() -> None:
    """Fails if the script asks for an element that the page does not have."""
    named = set(re.findall(r'find\("([\w-]+)"\)', (PAGE / "page.js").read_text(encoding="utf-8")))
    there = set(re.findall(r'id="([\w-]+)"', (PAGE / "index.html").read_text(encoding="utf-8")))
    assert named and named <= there


def test_vllm_is_told_every_mode(tmp_path: Path) -> None:
    """Fails if the printed command or a body cannot be parsed, if vLLM would take the runner that
    refuses the processors, or a template that always opens a thought is left to vLLM, which then
    never answers in NoThink."""
    config = load(Serve, None, [f"model={MODEL}", "name=r1v3-38b"])
    guide = vllm_guide(config)
    variable, *words = shlex.split(guide.splitlines()[1])
    assert variable == "VLLM_USE_V2_MODEL_RUNNER=0"
    assert words == vllm_command(config) and words[:2] == ["vllm", "serve"]
    assert "--chat-template" not in words  # the folder's own heeds the mode
    bodies = vllm_bodies(config)
    assert bodies["nothink"]["chat_template_kwargs"] == {"enable_thinking": False}
    for line in guide.splitlines():
        name, _, text = line.partition(": ")
        if name in bodies:
            assert ChatRequest.model_validate(json.loads(text)).model == "r1v3-38b"
            bodies.pop(name)
    assert bodies == {}
    other = tmp_path / "model"
    shutil.copytree(MODEL, other)
    template = (other / "chat_template.jinja").read_text() + "<think>\n"
    (other / "chat_template.jinja").write_text(template)
    words = vllm_command(load(Serve, None, [f"model={other}"]))
    given = words[words.index("--chat-template") + 1]
    assert given == load_tokenizer(other).chat_template != template
