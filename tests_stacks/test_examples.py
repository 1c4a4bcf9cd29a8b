"""The examples, each inside the stack that it is of."""

import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import trainers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Of trainers whose sources alone are here, what must be called before they can be imported.
SOURCES: dict[str, Callable[[], Any]] = {
    "slime_responses": trainers.slime,
    "openrlhf_actor": trainers.openrlhf,
    "nemo_rl_logits": trainers.nemo_rl,
    "prime_rl_head": trainers.prime_rl,
}


def run(name: str) -> dict[str, Any]:
    """The names that the example leaves."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_trl() -> None:
    """Fails if the example of TRL does not train, or trains with TRL's own head."""
    pytest.importorskip("trl")
    found = run("trl_grpo")
    found["rebound"].undo()
    assert len(found["rebound"].names) == 2
    assert len(found["losses"]) == 2


def test_transformers() -> None:
    """Fails if a thought in the example outlives its budget."""
    pytest.importorskip("trl")  # transformers is in other environments too, without what it needs
    found = run("transformers_thought_budget")
    assert all("</think>" in text for text in found["texts"])


def test_verl() -> None:
    """Fails if the example of verl calls a head or a loss that verl does not have."""
    pytest.importorskip("verl")
    found = run("verl_head_and_loss")
    assert found["rebound"].names and found["loss"].isfinite()
    assert found["model"].lm_head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", SOURCES)
def test_trainers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an example calls what the trainer does not have, or gets no gradient."""
    if importlib.util.find_spec("jaxtyping") is None:
        pytest.skip("not the trainers' environment")
    SOURCES[name]()
    if name == "nemo_rl_logits":  # which moves to a GPU by itself
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    found = run(name)
    assert found["rebound"].names
    if "graded" in found:
        assert found["graded"]["rewards"].tolist() == pytest.approx([1.0])
