"""Writing a Megatron InternVL as an HF model folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from r1v3.files import require_free_space, write_json
from r1v3.model.conversion.table import native_shapes, saved_name
from r1v3.model.conversion.writer import DEFAULT_SHARD_BYTES, Entry, ShardWriter
from r1v3.model.megatron.hf_weights import export_hf
from r1v3.ranks import Ranks

if TYPE_CHECKING:
    from r1v3.model.megatron.internvl import InternVL


def write_hf(
    model: "InternVL",
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ranks: Ranks,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write weights, config.json and the tokenizer into a folder, for transformers to load.

    Collective over all ranks of the job. Global rank 0 writes, one tensor at a time; data-parallel
    replicas other than the first only wait. The names are those of transformers' own
    `save_pretrained`.

    Args:
        folder: exists and holds no model, such as a checkpoint's temporary folder.
        ranks: all processes of the job.

    Raises:
        OSError: on every rank, if rank 0 could not write.
        ValueError: the model has other parameters than its configuration.
    """
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

    if not ranks.is_main:
        _exhaust(tensors)
    ranks.on_main(write)


def _exhaust(tensors: Iterator[object]) -> None:
    for _ in tensors:
        pass
