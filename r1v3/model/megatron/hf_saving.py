"""Writing a Megatron InternVL as an HF model folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r1v3.balance import longest_first
from r1v3.files import FileDigest, HashedFile, require_free_space, write_json
from r1v3.model.conversion.serving import write_serving_files
from r1v3.model.conversion.table import native_shapes, saved_name
from r1v3.model.conversion.writer import (
    DEFAULT_SHARD_BYTES,
    Entry,
    ShardWriter,
    byte_values,
    header,
    shards_of,
    write_index,
)
from r1v3.model.megatron.hf_weights import export_hf
from r1v3.ranks import Ranks

if TYPE_CHECKING:
    from r1v3.model.megatron.internvl import InternVL

# Weights sent together where each rank keeps some; files of a checkpoint are not smaller.
_BUCKET_BYTES = 16 << 20


def entries_of(model: "InternVL") -> dict[str, Entry]:
    """The tensors of a model folder, by native name."""
    dtype = next(model.parameters()).dtype
    shapes = native_shapes(model.hf_config)
    return {name: Entry(saved_name(name), dtype, shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class OwnShards:
    """The files of a model folder that this rank writes, copied to the host.

    shards: the files' names, and what is in each. tensors: their values, by saved name.
    """

    shards: Mapping[str, Sequence[Entry]]
    tensors: Mapping[str, Tensor]

    def write(self, folder: Path) -> dict[str, FileDigest]:
        """Write the files, which do not exist; return their digests by name."""
        digests = {}
        for name, shard in self.shards.items():
            text, places = header(shard)
            with HashedFile(folder / name) as file:
                file.write(text)
                for tensor in places:
                    file.write(byte_values(self.tensors[tensor]))
            digests[name] = file.digest
        return digests


def own_shards(
    model: "InternVL",
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranks: Ranks,
    least: int = _BUCKET_BYTES,
) -> OwnShards:
    """Divide a model folder among all ranks of the job; write what is not weights.

    A data-parallel replica gathers only the weights that its own ranks write.

    Args:
        folder: exists and holds no model.
        least: bytes below which weights are not divided further.

    Raises:
        OSError: on every rank, if rank 0 could not write.
    """
    from megatron.core import parallel_state

    entries = entries_of(model)
    total = sum(entry.bytes for entry in entries.values())
    shards = shards_of(list(entries.values()), max(least, -(-total // ranks.size)))
    sizes = [sum(entry.bytes for entry in shard) for shard in shards.values()]
    files = [[list(shards)[i] for i in part] for part in longest_first(sizes, ranks.size)]
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    neighbors = [rank for rank, other in enumerate(ranks.gather(replica)) if other == replica]
    gathered = {entry.name for rank in neighbors for file in files[rank] for entry in shards[file]}
    own = {file: shards[file] for file in files[ranks.rank]}
    wanted = {entry.name for shard in own.values() for entry in shard}
    tensors = {}
    names = {name for name, entry in entries.items() if entry.name in gathered}
    for name, tensor in export_hf(model, bucket_bytes=_BUCKET_BYTES, names=names):
        if (saved := entries[name].name) in wanted:
            tensors[saved] = tensor.detach().to("cpu", copy=True)

    def write() -> None:
        write_index(folder, shards)
        _write_config(model, folder, tokenizer)

    ranks.on_main(write)
    return OwnShards(own, tensors)


def _write_config(
    model: "InternVL", folder: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**model.hf_config.to_dict(), "dtype": dtype})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    write_serving_files(folder)


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

    entries = list(entries_of(model).values())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    tensors = export_hf(model, to_all=False) if replica == 0 else iter(())

    def write() -> None:
        try:
            total = sum(entry.bytes for entry in entries)
            require_free_space(folder, total, f"the model in {folder}")
            with ShardWriter(folder, entries, max_shard_bytes) as writer:
                for name, tensor in tensors:
                    writer.write(saved_name(name), tensor)
            _write_config(model, folder, tokenizer)
        finally:
            _exhaust(tensors)  # the other ranks send on, whatever failed here

    if not ranks.is_main:
        _exhaust(tensors)
    ranks.on_main(write)


def _exhaust(tensors: Iterator[object]) -> None:
    for _ in tensors:
        pass
