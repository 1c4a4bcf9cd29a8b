"""Converting a checkpoint on disk from one layout to the other.

The layouts differ in names, in q, k and v of the vision tower being one tensor or three, and in
config.json. All of that is a matter of byte ranges: values are copied as they are, whatever their
dtype, and memory stays at one buffer whatever the size of the model.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1v3.files import replace_directory, require_free_space, temporary_sibling, write_json
from r1v3.model.conversion.config import (
    is_original,
    load_config,
    native_config,
    read_config,
    to_original,
)
from r1v3.model.conversion.match import Source, require_match
from r1v3.model.conversion.reader import INDEX_FILE, Checkpoint
from r1v3.model.conversion.serving import write_serving_files
from r1v3.model.conversion.table import Weight, saved_name, weights
from r1v3.model.conversion.writer import DEFAULT_SHARD_BYTES, Entry, ShardWriter

Layout = Literal["native", "original"]
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: counts, weight files, tensors left out, and notes for the user."""

    tensors: int
    bytes: int
    files: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """A tensor to write: the sources whose values follow one another in it."""

    entry: Entry
    parts: tuple[tuple[Source, int], ...]  # with their bytes


def convert(
    source: Path | str,
    target: Path | str,
    layout: Layout,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write the model folder `source` as `target` in the given layout, all of it or nothing.

    Values are bit for bit those of the source. A source that is in that layout already is written
    again in shards of the wanted size. Tokenizer and processor files are copied; remote code is
    copied into the original layout only.

    Args:
        target: must not exist, or be an empty folder.
        layout: "native" (`InternVLForConditionalGeneration`, names as save_pretrained writes them)
            or "original" (InternVLChatModel and SkyworkR1VChatModel).
        progress: called with the bytes written so far and those in all.
    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen; all are listed.
        ValueError: a file is missing or damaged, or the model is another one.
        OSError: no room, or the target exists.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; remove it or choose another folder")
    written, native = read_config(source), native_config(source)
    table = weights(load_config(source))
    temporary = temporary_sibling(target.absolute())
    with Checkpoint(source) as checkpoint:
        sources, report = require_match(checkpoint, table)
        targets = list(_targets(table, sources, layout))
        allocated = sum(_allocated(file) for file in {s.stored.file for s in sources.values()})
        require_free_space(target.absolute().parent, allocated, f"the converted model {target}")
        temporary.mkdir(parents=True)
        try:
            files = _copy_values(checkpoint, targets, temporary, max_shard_bytes, progress)
            write_json(temporary / "config.json", _translated(written, native, layout))
            _copy_other_files(source, temporary, layout)
            if layout == "native":
                write_serving_files(temporary)
            replace_directory(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return Converted(
        tensors=len(targets),
        bytes=sum(one.entry.bytes for one in targets),
        files=tuple(files),
        ignored=tuple(report.ignored),
        notes=tuple(_notes(layout, target)),
    )


def _translated(written: Mapping[str, Any], native: Mapping[str, Any], layout: Layout) -> Any:
    if layout == "native":
        return native
    return written if is_original(written) else to_original(native)


def _targets(
    table: Sequence[Weight], sources: Mapping[str, Source], layout: Layout
) -> Iterator[_Target]:
    """The tensors of a layout. Raises ValueError where parts of one tensor differ in dtype."""
    for weight in table:
        if weight.tied:
            continue
        stacked = layout == "original" and len(weight.original) < len(weight.native)
        names = [saved_name(name) for name in weight.native]
        if layout == "original":
            names = list(weight.original)
        for index, name in enumerate(names):
            indices = range(len(weight.native)) if stacked else (index,)
            held = [sources[weight.native[part]] for part in indices]
            dtype = held[0].stored.dtype
            if any(one.stored.dtype != dtype for one in held):
                raise ValueError(f"{held[0].stored.file}: the parts of {name} differ in dtype")
            shapes = [weight.shapes[part] for part in indices]
            shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            sizes = [Entry(name, dtype, one).bytes for one in shapes]
            yield _Target(Entry(name, dtype, shape), tuple(zip(held, sizes, strict=True)))


def _copy_values(
    checkpoint: Checkpoint,
    targets: Sequence[_Target],
    folder: Path,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    total, done = sum(target.entry.bytes for target in targets), 0
    with ShardWriter(folder, [target.entry for target in targets], max_shard_bytes) as writer:
        for target in targets:
            at = 0
            for source, size in target.parts:
                stored = source.stored
                rows = stored.shape[0] if stored.shape else 1
                begin = stored.begin + source.row * (stored.bytes // rows)
                descriptor = checkpoint.descriptor(stored)
                writer.copy(target.entry.name, descriptor, begin, size, at=at)
                at += size
            done += at
            if progress:
                progress(done, total)
        return writer.files


def _copy_other_files(source: Path, target: Path, layout: Layout) -> None:
    for file in sorted(source.iterdir()):
        weight = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        code = file.suffix == ".py" and layout == "native"
        if file.is_file() and not (weight or code or file.name.startswith(".")):
            if file.name not in ("config.json", INDEX_FILE):
                shutil.copyfile(file, target / file.name)


def _notes(layout: Layout, target: Path) -> Iterator[str]:
    if layout == "original" and not any(target.glob("*.py")):
        yield (
            "the original layout is loaded with trust_remote_code, and the source has no such "
            "code: add the files that auto_map in config.json names from a published checkpoint"
        )


def _allocated(file: Path) -> int:
    """Bytes of a file that are not holes."""
    status = file.stat()
    return min(status.st_size, status.st_blocks * 512)
