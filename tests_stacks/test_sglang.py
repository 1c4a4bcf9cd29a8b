"""NoWait on SGLang's own base class, from its source, and over the wire as SGLang sends it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .sources import put_on_path

PACKAGES = ("sglang", "sglang.srt", "sglang.srt.sampling")
put_on_path("sglang", *PACKAGES)
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor  # noqa: E402

from r1v3.integrations.rebinding import parameters_of  # noqa: E402
from r1v3.integrations.sglang import NoWait  # noqa: E402


def test_it_is_what_sglang_calls() -> None:
    """Fails if SGLang's base class has other arguments or abstract methods."""
    assert issubclass(NoWait, CustomLogitProcessor)
    assert parameters_of(NoWait.__call__) == parameters_of(CustomLogitProcessor.__call__)


@pytest.mark.parametrize(
    ("params", "banned"),
    [
        (None, []), ([None, None, None], []), ([{}, {}, {}], []),
        ([{"banned_ids": [1, 2]}, None, None], [(0, 1), (0, 2)]),
        ([None, {"banned_ids": [7]}, None], [(1, 7)]),
        ([{"banned_ids": []}, None, {"banned_ids": [0]}], [(2, 0)]),
        ([{"banned_ids": [1]}, {"banned_ids": [2]}, {"banned_ids": [3]}], [(0, 1), (1, 2), (2, 3)]),
        ([{"other": 1}, {"banned_ids": [9]}, None], [(1, 9)]),
        ([{"banned_ids": [5, 5]}, None, None], [(0, 5)]),
        ([None, None, {"banned_ids": [9, 0]}], [(2, 0), (2, 9)]),
    ],
)  # fmt: skip
def test_each_row_has_its_own_bans(
    params: list[dict[str, list[int]] | None] | None, banned: list[tuple[int, int]]
) -> None:
    """Fails if requests of one batch must agree, or a row without bans is touched."""
    out = NoWait()(torch.zeros(3, 10), params)
    assert out.isinf().nonzero().tolist() == [list(pair) for pair in banned]
    assert (out == 0).sum() == 30 - len(banned)


def test_a_server_reads_what_a_request_carries() -> None:
    """Fails if another process, with r1v3 installed, cannot load the class from the string."""
    text = NoWait.to_str()
    assert len(json.loads(text)["callable"]) < 400, "a reference, not the code"
    program = f"""
from tests_stacks.sources import put_on_path
put_on_path("sglang", *{PACKAGES})
import sys, torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
found = CustomLogitProcessor.from_str(sys.argv[1])
out = found(torch.zeros(1, 4), [{{"banned_ids": [2]}}])
assert out.isinf().nonzero().tolist() == [[0, 2]]
print(type(found).__module__)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program, text], capture_output=True, text=True, cwd=root
    )
    assert done.stdout.strip() == "r1v3.integrations.sglang", done.stderr
