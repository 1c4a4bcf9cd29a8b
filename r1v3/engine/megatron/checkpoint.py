"""The files of a Megatron checkpoint: the optimizer's state as megatron-core's distributed
checkpoint, and the weights as a model folder of Hugging Face.

Every rank copies its own part to the host, writes it in a thread while training goes on, and hashes
what it writes; nothing of the optimizer is gathered. Both load in any tensor-, pipeline- and
data-parallel layout. The distributed checkpoint holds pickled metadata: load only files that your
own jobs have saved; to share a model, use the safetensors beside it.
"""

import queue
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import WriteBucket
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.storage import WriteResult

from r1v3.engine.megatron.optimizer import MegatronAdamW
from r1v3.engine.megatron.optimizer_blocks import optimizer_blocks
from r1v3.files import FileDigest, HashedFile
from r1v3.model.megatron.hf_saving import OwnShards
from r1v3.model.megatron.internvl import InternVL
from r1v3.ranks import Ranks

FOLDER = "megatron"


class BackgroundWriting:
    """A `contract.Writing`: the files of this rank, written by a thread.

    Args:
        write: writes this rank's files; returns their digests.
        finalize: called by every rank, in its main thread, when all files are written.
    """

    def __init__(
        self,
        write: Callable[[], dict[str, FileDigest]],
        finalize: Callable[[], None],
        ranks: Ranks,
    ) -> None:
        self.digests: Mapping[str, FileDigest] = {}
        self._finalize, self._ranks, self._waiting = finalize, ranks, True
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written = executor.submit(write)
        executor.shutdown(wait=False)

    def done(self) -> bool:
        """See `contract.Writing.done`."""
        return all(self._ranks.gather(self._written.done()))

    def wait(self) -> None:
        """See `contract.Writing.wait`.

        Raises:
            OSError, RuntimeError: on every rank, if one could not write.
        """
        if not self._waiting:
            return
        self._waiting = False
        error = self._written.exception()
        if error is not None and not isinstance(error, OSError):
            error = RuntimeError(f"writing a checkpoint failed: {error!r}")
        for found in self._ranks.gather(error):
            if found is not None:
                raise found
        self.digests = self._written.result()
        self._finalize()


def save_strategy() -> FullyParallelSaveStrategyWrapper:
    """Return what writes one file a rank, and finds once which rank writes replicated tensors."""
    writer = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    return FullyParallelSaveStrategyWrapper(writer, _replicas(), do_cache_distribution=True)


def save_sharded(
    directory: Path,
    shards: OwnShards,
    model: InternVL,
    optimizer: MegatronAdamW,
    strategy: FullyParallelSaveStrategyWrapper,
    ranks: Ranks,
) -> BackgroundWriting:
    """Start to write weights and optimizer state below an existing directory.

    Args:
        shards: this rank's files of the model folder.
        strategy: of `save_strategy`, the same for every checkpoint of this optimizer.
    """
    folder = directory / FOLDER
    ranks.on_main(folder.mkdir)
    # megatron-core's own queue is that of a further process; the writer is a thread here.
    filesystem_async._results_queue = queue.Queue()
    request = dist_checkpointing.save(
        _state(model, optimizer),
        str(folder),
        strategy,
        validate_access_integrity=False,  # `strategy` does, once
        async_sharded_save=True,
    )
    buckets, results = _on_host(request, model, optimizer)

    def write() -> dict[str, FileDigest]:
        digests = shards.write(directory)
        written = {}
        for number, bucket in enumerate(buckets):
            written[number], digest = _write_bucket(bucket)
            digests[f"{FOLDER}/{bucket[1]}"] = digest
        if results is not None:
            results.put(written)
        return digests

    def finalize() -> None:
        for function in request.finalize_fns:
            function()

    return BackgroundWriting(write, finalize, ranks)


def _on_host(
    request: AsyncRequest, model: InternVL, optimizer: MegatronAdamW
) -> tuple[list[WriteBucket], "queue.Queue[dict[int, list[WriteResult]]] | None"]:
    """Copies of what this rank writes, that training does not change; where results go."""
    if request.async_fn is None:
        return [], None
    live = {tensor.untyped_storage().data_ptr() for tensor in _live(model, optimizer)}

    def own(tensor: Tensor) -> Tensor:
        # megatron-core copies from devices, and views.
        return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor

    buckets = [
        (path, key, (objects, [(item, own(tensor)) for item, tensor in tensors]))
        for path, key, (objects, tensors) in request.preload_fn()
    ]
    return buckets, request.async_fn_args[2]


def _live(model: InternVL, optimizer: MegatronAdamW) -> list[Tensor]:
    """All tensors that a step changes."""
    found: list[Tensor] = list(model.parameters())
    for chained in optimizer.optimizer.chained_optimizers:
        if chained.optimizer is not None:
            for group in chained.optimizer.param_groups:
                found += group["params"]
            for state in chained.optimizer.state.values():
                found += [one for one in state.values() if isinstance(one, Tensor)]
    return found


def _write_bucket(bucket: WriteBucket) -> tuple[list[WriteResult], FileDigest]:
    """Write one file of a distributed checkpoint."""
    path, key, (objects, tensors) = bucket
    transforms, kind = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
    with HashedFile(Path(path)) as file:
        results = [
            _write_item(transforms, file, data, item, key, kind)  # type: ignore[arg-type]
            for item, data in objects + tensors
        ]
    return results, file.digest


def load_sharded(directory: Path, model: InternVL, optimizer: MegatronAdamW) -> None:
    """Load the optimizer's state of `save_sharded`, of this layout or another."""
    folder = str(directory / FOLDER)
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(folder), _replicas()
    )
    weights = model.sharded_state_dict(prefix="")
    chained = optimizer.optimizer.chained_optimizers
    if optimizer.distributed:
        [sharded] = chained
        sharded.load_state_dict(dist_checkpointing.load_common_state_dict(folder)["optimizer"])
        # In place: the blocks are views.
        dist_checkpointing.load(optimizer_blocks(sharded, weights), folder, strategy)
    else:
        wanted = optimizer.optimizer.sharded_state_dict(weights, is_loading=True)
        state = dist_checkpointing.load({"optimizer": wanted}, folder, strategy)
        optimizer.optimizer.load_state_dict(state["optimizer"])
    for one in chained:
        # torch's AdamW counts in place, and was given one counter for all parameters.
        for moments in one.optimizer.state.values():
            if isinstance(moments.get("step"), Tensor):
                moments["step"] = moments["step"].clone()


def _state(model: InternVL, optimizer: MegatronAdamW) -> dict[str, Any]:
    """The optimizer, as megatron-core saves it."""
    weights = model.sharded_state_dict(prefix="")
    if not optimizer.distributed:
        return {"optimizer": optimizer.optimizer.sharded_state_dict(weights)}
    [sharded] = optimizer.optimizer.chained_optimizers
    assert isinstance(sharded, DistributedOptimizer)
    return {"optimizer": sharded.state_dict(), "blocks": optimizer_blocks(sharded, weights)}


def _replicas() -> torch.distributed.ProcessGroup:
    """The ranks that hold the same weights, which share the writing and reading of replicas."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
