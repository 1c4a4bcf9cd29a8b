"""MegatronEngine: InternVL on megatron-core, over the ranks that torchrun started."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1v3.config import Stage
from r1v3.data.batch import Batch, cut_ahead
from r1v3.engine.contract import LossFn
from r1v3.engine.head import ContextTokens, Head
from r1v3.engine.megatron.checkpoint import (
    BackgroundWriting,
    load_sharded,
    save_sharded,
    save_strategy,
)
from r1v3.engine.megatron.decoder import Decoder
from r1v3.engine.megatron.optimizer import MegatronAdamW, wrap
from r1v3.engine.shares import replica_shares
from r1v3.model.conversion import load_config
from r1v3.model.flops import Dimensions, Work
from r1v3.model.megatron.context import context_part
from r1v3.model.megatron.hf_saving import entries_of, own_shards, write_hf
from r1v3.model.megatron.hf_weights import export_hf, load_hf
from r1v3.model.megatron.internvl import InternVL
from r1v3.model.megatron.options import ModelOptions
from r1v3.model.megatron.packing import Packed, pack
from r1v3.model.parts import check_modules, part_of
from r1v3.ranks import Ranks

# (head, index of the micro-batch) -> (loss, tensors to return).
_Use = Callable[[Head, int], tuple[Tensor, dict[str, Tensor]]]


class MegatronEngine:
    """A `contract.Engine` over tensor-, pipeline-, context- and data-parallel ranks.

    `r1v3.engine.megatron.ranks.connect` comes first.

    Args:
        folder: a model folder in either layout of names; each rank reads its own part.
        config: of the stage, with layout, dtype and device.
        ranks: all processes of the job.
        modules, weight_decay, betas, max_grad_norm, temperature: as for `HFEngine`.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        config: Stage,
        ranks: Ranks,
        *,
        modules: Mapping[str, bool] | None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        trained = check_modules(modules)
        self.tokenizer, self.temperature, self.ranks = tokenizer, temperature, ranks
        self.replicas = Ranks(parallel_state.get_data_parallel_group_gloo())
        self.samplers = Ranks(
            parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        )
        self.config = load_config(folder)
        parallel = config.parallel
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        options = ModelOptions(
            dtype=getattr(torch, config.dtype),
            sequence_parallel=parallel.sequence,
            first_stage_layers=parallel.first_stage_layers,
            last_stage_layers=parallel.last_stage_layers,
            recompute=parallel.recompute,
        )
        self.model = InternVL(
            self.config,
            options,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ).to(self.device)
        load_hf(self.model, folder)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained[part_of(name)])
        self._dims, self._trained = Dimensions.of(self.config), trained
        self._recompute = parallel.recompute == "full"
        self._rows = parallel.tensor if parallel.sequence else 1
        self._runs: DistributedDataParallel | InternVL = self.model
        if modules is None:
            return
        self._runs = wrap(self.model, distributed_optimizer=parallel.distributed_optimizer)
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = MegatronAdamW(
            self._runs,
            weight_decay=weight_decay,
            betas=betas,
            max_grad_norm=max_grad_norm,
            bf16=options.dtype == torch.bfloat16,
            distributed=parallel.distributed_optimizer,
        )
        self._save_strategy = save_strategy()

    @property
    def reports(self) -> bool:
        """See `contract.Engine.reports`."""
        return (
            self.model.post_process
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )

    def shares(self, works: Sequence[Work]) -> list[list[int]]:
        """See `contract.Engine.shares`: all replicas have about as many operations."""
        return replica_shares(
            works,
            self.replicas.size,
            self._dims,
            self._trained,
            recompute=self._recompute,
            pipelined=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        )

    def prepare(self, micro_batches: Sequence[Batch]) -> None:
        """See `contract.Engine.prepare`."""
        if self.model.pre_process:
            cut_ahead(micro_batches)

    def evaluate(self, micro_batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """See `contract.Engine.evaluate`."""

        def use(head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = head.logprobs_and_entropy()
            found = {"logprobs": logprobs, "entropy": entropy}
            return logprobs.new_zeros(()), found

        with torch.no_grad():
            _, outputs = self._run(micro_batches, use, forward_only=True)
        return [(output["logprobs"], output["entropy"]) for output in outputs]

    def train_step(
        self, micro_batches: Sequence[Batch], loss_fn: LossFn, *, learning_rate: float
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """See `contract.Engine.train_step`."""
        self.optimizer.zero_grad()
        loss, outputs = self._run(micro_batches, loss_fn, forward_only=False)
        norms = self.optimizer.step(learning_rate)
        return {"loss": loss, **norms}, outputs

    def _run(
        self, micro_batches: Sequence[Batch], use: _Use, *, forward_only: bool
    ) -> tuple[float, list[dict[str, Tensor]]]:
        """Pass micro-batches through the pipeline.

        Returns:
            The summed loss of all replicas, and the outputs of these micro-batches.
        """
        self.prepare(micro_batches)
        count = len(micro_batches)
        losses: dict[int, float] = {}
        outputs: dict[int, dict[str, Tensor]] = {}
        # The schedule divides losses by the micro-batches, and reduction by the replicas; together
        # they add up the gradients of context-parallel ranks.
        scale = count * self.replicas.size

        def forward(batches: Iterator[int], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            index = next(batches)
            packed = self._pack(micro_batches[index])

            def loss_of(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                head = self._head(hidden, packed, micro_batches[index].loss_mask)
                loss, output = use(head, index)
                losses[index] = float(loss.detach())
                outputs[index] = {name: value.detach().cpu() for name, value in output.items()}
                return loss * scale, {}

            return model(packed), loss_of

        if count:
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(range(count)),
                model=[self._runs],
                num_microbatches=count,
                seq_length=1,  # sizes travel with the activations
                micro_batch_size=1,
                forward_only=forward_only,
            )
        elif not forward_only:
            finalize_model_grads([self._runs])
        own = sum(losses.values()) if self.reports else 0.0
        total = float(self.ranks.sum(torch.tensor(own, dtype=torch.float64)))
        return total, [outputs[index] for index in sorted(outputs)]

    def _pack(self, batch: Batch) -> Packed:
        if not self.model.pre_process:
            batch = replace(batch, pixels=None)  # only the first stage looks at pictures
        image, ranks = self.config.image_token_id, parallel_state.get_context_parallel_world_size()
        if ranks == 1:
            packed = pack(batch, image_token_id=image, multiple_of=self._rows)
        else:
            rank = parallel_state.get_context_parallel_rank()
            whole = pack(batch, image_token_id=image)
            packed = context_part(whole, rank, ranks, multiple_of=self._rows)
        return packed.to(self.device)

    def _head(self, hidden: Tensor, packed: Packed, loss_mask: Tensor) -> Head:
        """The head on the last stage; its gather sums gradients over the shards."""
        sharded = parallel_state.get_tensor_model_parallel_world_size() > 1
        states = self.model.gather_hidden(hidden, reduce_grad=sharded)
        context = None
        if parallel_state.get_context_parallel_world_size() > 1:
            mask = torch.zeros(packed.shape, dtype=torch.bool, device=self.device)
            mask.view(-1)[packed.places] = True
            context = ContextTokens(mask, parallel_state.get_context_parallel_group())
        return Head(
            states.index_select(0, packed.hidden_rows),
            self.model.head_weight,
            packed.token_ids,
            loss_mask.to(self.device),
            self.temperature,
            vocab_size=self.model.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group() if sharded else None,
            reduce_hidden_grad=not sharded,
            context=context,
        )

    def decoder(self) -> Decoder:
        """See `contract.Engine.decoder`."""
        return Decoder(self.model)

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """See `contract.Engine.export_hf`: full tensors on every rank, one at a time."""
        return export_hf(self.model)

    def save(self, directory: Path) -> None:
        """See `contract.Engine.save`."""
        write_hf(self.model, directory, self.tokenizer, ranks=self.ranks)

    def load_weights(self, directory: Path) -> None:
        """See `contract.Engine.load_weights`; the optimizer's main parameters follow."""
        load_hf(self.model, directory)
        self.optimizer.optimizer.reload_model_params()

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """Return nothing: `save_state` writes the optimizer's shards."""
        return {}

    def state_bytes(self) -> int:
        """See `contract.Engine.state_bytes`."""
        weights = sum(entry.bytes for entry in entries_of(self.model).values())
        return weights + sum(self.ranks.gather(self.optimizer.state_bytes()))

    def save_state(self, directory: Path) -> BackgroundWriting:
        """See `contract.Engine.save_state`; what this rank writes is copied before it returns."""
        shards = own_shards(self.model, directory, self.tokenizer, ranks=self.ranks)
        return save_sharded(
            directory, shards, self.model, self.optimizer, self._save_strategy, self.ranks
        )

    def load_state(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """See `contract.Engine.load_state`; the layout may be another than the one that saved."""
        load_hf(self.model, directory)
        load_sharded(directory, self.model, self.optimizer)
