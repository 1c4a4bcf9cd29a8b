"""Writing a Megatron InternVL as an HF model folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from r1v3.files import replace_directory, require_free_space, temporary_sibling, write_json
from r1v3.model.conversion.table import native_shapes, saved_name
from r1v3.model.conversion.writer import DEFAULT_SHARD_BYTES, Entry, ShardWriter
from r1v3.model.megatron.hf_weights import export_hf
from r1v3.ranks import Ranks

if TYPE_CHECKING:
    from r1v3.model.megatron.internvl import InternVL


def save_hf(
    model: "InternVL",
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a model folder that transformers loads: weights, config.json and the tokenizer.

    Collective over all ranks of the job. Global rank 0 writes, one tensor at a time, under a
    temporary name that replaces `folder` at the end; data-parallel replicas other than the first
    only wait, so the process group's timeout must be longer than the writing takes. The names are
    those of transformers' own `save_pretrained`.

    Raises:
        OSError: on every rank, if rank 0 could not write; an earlier `folder` is as it was.
        ValueError: the model has other parameters than its configuration.
    """
    folder = Path(folder)
    temporary = temporary_sibling(folder)

    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()

    on_main = Ranks(dist.group.WORLD).on_main
    try:
        on_main(begin)
        write_hf(model, temporary, tokenizer, max_shard_bytes=max_shard_bytes)
        on_main(lambda: replace_directory(temporary, folder))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def write_hf(
    model: "InternVL",
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """`save_hf` into an existing folder without a model, such as a checkpoint's temporary one."""
    from megatron.core import parallel_state

    dtype = next(model.parameters()).dtype
    shapes = native_shapes(model.hf_config)
    entries = [Entry(saved_name(name), dtype, shape) for name, shape in shapes.items()]
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    tensors = export_hf(model, to_all=False) if replica == 0 else iter(())

    def write() -> None:
        try:
            total = sum(entry.bytes for entry in entries)
            require_free_space(folder, total, f"the model in {folder}")
            with ShardWriter(folder, entries, max_shard_bytes) as writer:
                for name, tensor in tensors:
                    writer.write(saved_name(name), tensor)
            config = {**model.hf_config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
            write_json(folder / "config.json", config)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        finally:
            _exhaust(tensors)  # the other ranks send on, whatever failed here

    if dist.get_rank() != 0:
        _exhaust(tensors)
    Ranks(dist.group.WORLD).on_main(write)


def _exhaust(tensors: Iterator[object]) -> None:
    for _ in tensors:
        pass
