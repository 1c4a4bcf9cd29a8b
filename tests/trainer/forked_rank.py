"""A verb of `r1v3` as one rank of a job whose ranks share the imports; see tests/ranks.py.

torchrun would import PyTorch and megatron-core anew in every rank, which takes longer than a tiny
stage.
"""

import os
from pathlib import Path

import r1v3.engine.megatron.engine  # noqa: F401
import r1v3.rollout.local  # noqa: F401
from r1v3.cli import app


def main(folder: Path, *arguments: str) -> None:
    os.chdir(folder)
    app(args=list(arguments), prog_name="r1v3", standalone_mode=False)
