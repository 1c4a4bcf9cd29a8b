"""Answers one question about a person's own picture."""

from pathlib import Path

import torch
import typer

from r1v3.config import Decoding, Evaluate
from r1v3.data.images import load_image
from r1v3.data.sample import make_sample
from r1v3.evaluation.evaluate import load_policy, mode_sampling
from r1v3.rollout.contract import Sampling

MODES = ("slow", "nothink", "nowait")
_NEWEST_FIRST = ("connector", "selected", "grpo", "sft")


def model_folder(checkpoint: Path) -> Path:
    """A model folder as it is; of a run folder, the model of its latest finished stage."""
    if (checkpoint / "config.json").is_file():
        return checkpoint
    for name in _NEWEST_FIRST:
        if (checkpoint / "models" / name / "config.json").is_file():
            return checkpoint / "models" / name
    raise ValueError(f"{checkpoint} is neither a model folder nor a run folder with models in it")


def answer_about_image(
    checkpoint: Path,
    image: Path,
    question: str,
    *,
    mode: str,
    budget: int | None,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> str:
    """Print and return the completion.

    Raises:
        ValueError: an unknown mode, an unreadable picture, an empty question, a budget with a mode
            that does not think.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if budget is not None and mode == "nothink":
        raise ValueError("--budget limits a thought; mode nothink has none")
    if budget is not None and budget < 0:
        raise ValueError(f"--budget {budget} must not be negative")
    if not question.strip():
        raise ValueError("--question is empty")
    if not image.is_file():
        raise ValueError(f"--image {image}: no such file")
    load_image(image)  # names the file where it is no picture
    folder = model_folder(checkpoint)
    sample = make_sample(
        question=question,
        ground_truth="",
        data_source="r1v3/own",
        index=0,
        images=[image.read_bytes()],
    )
    policy = load_policy(folder)
    config = Evaluate(
        run=Path("."),
        model=folder,
        data=(),
        decoding=Decoding(temperature=temperature, max_tokens=max_tokens),
    )
    sampling, thinking = mode_sampling(config, policy, mode)
    sampling = Sampling(temperature, max_tokens, sampling.banned, budget)
    answers = policy.answer(
        [sample], sampling, generator=torch.Generator().manual_seed(seed), thinking=thinking
    )
    text = answers.texts[0]
    # What a model writes is untrusted: no control characters reach the terminal.
    printable = "".join(c for c in text if c.isprintable() or c == "\n")
    typer.echo(f"<think>\n{printable}" if thinking else printable)
    typer.secho(f"{folder}: {int(answers.tokens[0, 0])} tokens", dim=True, err=True)
    return text
