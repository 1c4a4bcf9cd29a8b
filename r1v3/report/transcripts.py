"""Transcripts made ready to show: checked types, embedded images, a shade for every token.

A transcript is text from a model about an image from a data set. Nothing in it is trusted: fields
of the wrong type become text or nothing, and an image is only read from inside the run folder.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from r1v3.data.images import load_image
from r1v3.report.run_folder import STAGE_NAMES, STAGES, Record, RunFolder, number

SHADES = 10
MOST_TOKENS = 800
LARGEST_SIDE = 512  # pixels of an embedded image


@dataclass(frozen=True)
class Token:
    """One generated token. `shade` is 0 (certain) to SHADES - 1; entropy in nats or None."""

    text: str
    entropy: float | None
    shade: int
    critical: bool


@dataclass(frozen=True)
class Answer:
    """One response to a case, by the model of one stage."""

    stage: str
    mode: str
    correct: bool | None
    tokens: list[Token]
    omitted: int


@dataclass(frozen=True)
class Case:
    """One question with its image (a data URI, or why there is none) and one answer per stage."""

    question: str
    options: list[str]
    ground_truth: str
    image: str
    image_note: str
    answers: list[Answer]


def _stage_order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


def _tokens_of(entry: Record) -> list[Record]:
    """Tokens of an entry; its whole response as one token without entropy when it has none."""
    tokens = entry.get("tokens")
    found = [t for t in tokens if isinstance(t, dict)] if isinstance(tokens, list) else []
    return found or [{"text": entry.get("response")}]


def image_data_uri(run_dir: Path, name: object) -> tuple[str, str]:
    """(data URI, "") of an image inside `run_dir`, or ("", the reason why there is none).

    The image is decoded, made at most LARGEST_SIDE pixels wide and high, and encoded as PNG again.
    """
    if not isinstance(name, str) or not name:
        return "", "no image recorded"
    root = run_dir.resolve()
    for folder in (root, root / "transcripts"):
        try:
            file = (folder / name).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                continue
            return picture_data_uri(file), ""
        except (OSError, ValueError):
            return "", "the image cannot be read"
    return "", "the image is not in the run folder"


def picture_data_uri(source: Path | bytes) -> str:
    """A picture at most LARGEST_SIDE pixels wide and high, as a PNG data URI.

    Raises:
        ValueError: as `load_image`.
    """
    picture = load_image(source, truncated="accept")
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def select_cases(run: RunFolder, most: int = 6) -> list[list[tuple[str, Record]]]:
    """Up to `most` questions, each with its (stage, transcript) pairs in the order of the recipe.

    Questions that more stages answered come first, then file order; the answers play no part.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, Record]]] = {}
    for stage in sorted(run.transcripts, key=_stage_order):
        for entry in run.transcripts[stage]:
            key = tuple(_text(entry.get(k)) for k in ("question", "image", "mode"))
            groups.setdefault((key[0], key[1], key[2]), []).append((stage, entry))
    distinct = sorted(groups.values(), key=lambda g: -len({stage for stage, _ in g}))
    return distinct[:most]


def show_cases(run: RunFolder, most: int = 6) -> tuple[list[Case], float]:
    """Cases ready to show and the entropy in nats of the darkest shade (0 without entropies)."""
    chosen = select_cases(run, most)
    shown = [t for group in chosen for _, entry in group for t in _tokens_of(entry)[:MOST_TOKENS]]
    top = max((number(t.get("entropy")) or 0.0 for t in shown), default=0.0)
    cases = []
    for group in chosen:
        first = group[0][1]
        options = first.get("options")
        uri, note = image_data_uri(run.path, first.get("image"))
        cases.append(
            Case(
                question=_text(first.get("question")).replace("<image>", "").strip(),
                options=[_text(o) for o in options] if isinstance(options, list) else [],
                ground_truth=_text(first.get("ground_truth")),
                image=uri,
                image_note=note,
                answers=[_answer(stage, entry, top) for stage, entry in group],
            )
        )
    return cases, top


def _answer(stage: str, entry: Record, top: float) -> Answer:
    tokens = _tokens_of(entry)
    correct = entry.get("correct")
    return Answer(
        stage=STAGE_NAMES.get(stage, stage),
        mode=_text(entry.get("mode")),
        correct=correct if isinstance(correct, bool) else None,
        tokens=[_token(t, top) for t in tokens[:MOST_TOKENS]],
        omitted=max(len(tokens) - MOST_TOKENS, 0),
    )


def _token(token: Record, top: float) -> Token:
    entropy = number(token.get("entropy"))
    level = max(entropy or 0.0, 0.0) / top if top > 0 else 0.0
    shade = min(int(level * SHADES), SHADES - 1)
    return Token(_text(token.get("text")), entropy, shade, token.get("critical") is True)
