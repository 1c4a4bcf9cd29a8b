"""An answer to one question about an image of the user's own."""

from dataclasses import replace
from pathlib import Path

import torch
import typer

from r1v3.config import Decoding, Monitor, Pictures
from r1v3.data.images import load_image
from r1v3.data.pixels import Ground
from r1v3.data.sample import make_sample
from r1v3.evaluation.policy import load_policy, mode_sampling

MODES = ("slow", "nothink", "nowait")
_NEWEST_FIRST = ("connector", "selected", "grpo", "sft")


def model_folder(checkpoint: Path) -> Path:
    """Return the folder if it holds a model; of a run folder, the model of the last stage done.

    Raises:
        ValueError: the folder is neither.
    """
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
    max_tiles: int | None = None,
    ground: Ground = "white",
) -> str:
    """Print and return the completion.

    The picture is cut into as many tiles as the model's configuration says, or `max_tiles`.

    Raises:
        ValueError: an unknown mode, an image that cannot be read, an empty question, a negative
            budget, or a budget with a mode that does not think.
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
    load_image(image)  # raises if it cannot be decoded
    folder = model_folder(checkpoint)
    sample = make_sample(
        question=question,
        ground_truth="",
        data_source="r1v3/own",
        index=0,
        images=[image.read_bytes()],
    )
    policy = load_policy(folder, max_tiles=max_tiles, pictures=Pictures(ground=ground))
    sampling, thinking = mode_sampling(
        Decoding(temperature=temperature, max_tokens=max_tokens),
        Monitor().words,
        policy.tokenizer,
        mode,
    )
    sampling = replace(sampling, budget=budget)
    answers = policy.answer(
        [sample], sampling, generator=torch.Generator().manual_seed(seed), thinking=thinking
    )
    text = answers.texts[0]
    # A model's text is untrusted: no control characters reach the terminal.
    printable = "".join(c for c in text if c.isprintable() or c == "\n")
    typer.echo(f"<think>\n{printable}" if thinking else printable)
    typer.secho(f"{folder}: {int(answers.tokens[0, 0])} tokens", dim=True, err=True)
    return text
