"""README.md and docs/ name files, commands and settings that exist, and their Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from r1v3.cli import app
from r1v3.config import STAGES, Distill, Section, Suite, load
from r1v3.rewards import score

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# What a page may name with a path from the root; `runs/` is where runs are written.
TOP = ("assets", "benchmarks", "configs", "csrc", "docs", "examples", "r1v3", "tests")
VERBS: dict[str, type[Section]] = STAGES | {"suite": Suite, "distill": Distill}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of every `r1v3 ...` in the shell blocks and in the text of a page."""
    lines = [
        line.partition("#")[0].replace("-m r1v3 ", "&& r1v3 ")
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`(r1v3 [^`]+)`", page.read_text(encoding="utf-8"))
    found = (line[line.index("r1v3 ") :] for line in lines if re.search(r"(^|&& )r1v3 ", line))
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page: Path) -> None:
    """Fails if a page sends its reader to a file that was moved or renamed."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./*-]*[\w/*]", text))
    # A link is relative to its page.
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    missing = {name for name in named if not list(ROOT.glob(name.rstrip("/")))}
    missing |= {link for link in links if not (page.parent / link).exists()}
    # In a table of one package's files, names stand alone.
    bare = set(re.findall(r"`(\w+\.py|\w+/)`", text)) - {f"{name}/" for name in TOP}
    missing |= {name for name in bare - {"runs/"} if not list(ROOT.glob(f"[cr]*/**/{name}"))}
    assert named and missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_a_page_has_its_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    """Fails if a page names a verb that r1v3 does not have, or a setting that its stage refuses."""
    verbs = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    }
    found = commands(page)
    assert found and {words[1] for words in found} <= verbs
    for _, verb, *words in found:
        if verb in VERBS and words and words[0].endswith(".yaml"):
            overrides = [word for word in words[1:] if "=" in word]
            load(VERBS[verb], ROOT / words[0], overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.M))
    assert named <= targets


def test_the_map_names_every_package() -> None:
    """Fails if a package is added and the map in the README does not say what is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = {f"r1v3/{init.parent.name}" for init in (ROOT / "r1v3").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"^\| `([\w/]+)` \|", text, re.M))


def test_python_of_the_readme_runs() -> None:
    """Fails if the first lines that a reader copies raise."""
    kernels, rewards = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(kernels, names)
    assert names["loss"].isfinite()  # type: ignore[attr-defined]
    assert names["logits"].grad.isfinite().all()  # type: ignore[attr-defined]
    exec(rewards, names)
    assert names["score"] is score
    assert [reward.total for reward in names["rewards"]] == [1.0]  # type: ignore[attr-defined]


def test_python_of_the_kernels_page_runs() -> None:
    """Fails if an example is wrong, or if a loss in parts no longer has the whole gradient."""
    several, step, split, sample, losses = blocks(ROOT / "docs" / "kernels.md", "python")
    names: dict[str, object] = {}
    exec(several, names)
    student = (names["hidden"] @ names["head"].T).log_softmax(-1)  # type: ignore[operator, attr-defined]
    torch.testing.assert_close(names["student"], student.gather(-1, names["top"]))  # type: ignore[arg-type]
    exec(step, names)
    hidden: torch.Tensor = names["hidden"]  # type: ignore[assignment]
    assert hidden.grad is not None
    whole = hidden.grad.clone()
    hidden.grad = None
    exec(split, names)
    # The ratio is 1, so that clipping changes nothing.
    torch.testing.assert_close(hidden.grad, whole)
    exec(sample, names)
    wait, tokens = names["wait"], names["tokens"]
    assert not torch.isin(tokens[:4], wait).any()  # type: ignore[arg-type, index]
    exec(losses, names)
    exec("mean = grpo_loss(behaviour, None, advantages, mask, normalizer=B)[0]", names)
    torch.testing.assert_close(names["every_row"], names["mean"])
