"""Small checkpoints for the tests of them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r1v3.trainer.checkpoint import start_checkpoint


def write_model(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "internvl"}')
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_text("{}")
    save_file({"weight": torch.arange(12.0)}, directory / "model.safetensors")


def save(root: Path, step: int, **options: Any) -> Path:
    arguments: dict[str, Any] = {
        "tensors": {"moment": torch.full((300,), float(step))},
        "state": {"seed": 7, "step": step},
        "write_model": write_model,
        **options,
    }
    return start_checkpoint(root, step, **arguments).finish()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
