"""HFEngine: transformers' InternVL, a whole one in every process."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from r1v3.data.batch import Batch, cut_ahead
from r1v3.engine.contract import LossFn
from r1v3.engine.head import Head
from r1v3.engine.hf.decoder import HFDecoder, prefill
from r1v3.engine.hf.optimizer_state import load_optimizer_tensors, optimizer_tensors
from r1v3.engine.shares import replica_shares
from r1v3.model.conversion.serving import write_serving_files
from r1v3.model.conversion.writer import save_tensors
from r1v3.model.flops import Dimensions, Work
from r1v3.model.internvl import load_model, named_part_parameters
from r1v3.model.parts import PARTS, check_modules
from r1v3.ranks import ALONE, Ranks

# Rows that are run together: enough to fill a matrix product, few enough to be of like length.
_ROWS = 16


class PrefixCache:
    """Keys and values of the prompts, shared by the samples of each, gradients included."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prompts: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Record keys and values while prefilling, then extend those of `prompts`."""
        if self.prompts is None:
            self.keys.append(keys)
            self.values.append(values)
            return keys, values
        prefix_keys = self.keys[layer].index_select(0, self.prompts)
        prefix_values = self.values[layer].index_select(0, self.prompts)
        return torch.cat([prefix_keys, keys], 2), torch.cat([prefix_values, values], 2)


def response_hidden(model: InternVLForConditionalGeneration, batch: Batch) -> Tensor:
    """Compute the hidden states [P * G, R, H] that predict the response tokens.

    They are 0 after a row's last token that counts. Each prompt is run once; its samples share its
    keys and values (and their gradients). This is exact, because a causal prompt does not depend on
    the tokens after it. Responses are run in order of length, 16 at a time, so that short ones are
    not padded to the longest.
    """
    cache = PrefixCache()
    hidden = prefill(model, cache, batch.prompt_ids, batch.prompt_mask, batch.pixel_values)
    rows, width = batch.response_ids.shape
    prompts = torch.arange(rows, device=hidden.device) // batch.group_size
    if not width:
        return hidden[prompts, :0]
    numbers = torch.arange(1, width + 1, device=hidden.device)
    lengths = (batch.loss_mask * numbers).amax(1).clamp(min=1)
    by_length = lengths.argsort(stable=True)
    parts = by_length.split(_ROWS)
    # In one transfer: every number asked of a GPU waits for all that it has to do.
    longest = lengths[torch.stack([part[-1] for part in parts])].tolist()
    results = []
    for chosen, length in zip(parts, longest, strict=True):
        cache.prompts = prompts[chosen]
        states = hidden[cache.prompts, -1:]
        if length > 1:
            rest = _continue(model, cache, batch, batch.response_ids[chosen, : length - 1])
            states = torch.cat([states, rest], 1)
        results.append(nn.functional.pad(states, (0, 0, 0, width - length)))
    return torch.cat(results).index_select(0, by_length.argsort())


def _continue(
    model: InternVLForConditionalGeneration, cache: PrefixCache, batch: Batch, ids: Tensor
) -> Tensor:
    """Compute the final hidden states [N, L, H] of response tokens [N, L] after their prompts."""
    length = ids.shape[1]
    prompt_mask = batch.prompt_mask[cache.prompts]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    mask = torch.cat(
        [
            prompt_mask[:, None, None, :].expand(-1, 1, length, -1),
            causal.expand(len(ids), 1, -1, -1),
        ],
        dim=-1,
    )
    positions = prompt_mask.sum(1, keepdim=True) + torch.arange(length, device=ids.device)
    return model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask={"full_attention": mask},
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


class HFEngine:
    """A `contract.Engine` with AdamW, alone or data-parallel.

    Each rank computes a part of the micro-batches, and all take the same step with the summed
    gradients; so there should be as many micro-batches as ranks, or a multiple. Two micro-batches
    on two ranks give the bits that they give on one.

    Args:
        model: transformers' InternVL, on the device and in the dtype of training; the same weights
            on every rank.
        tokenizer: saved beside the weights.
        modules: whether each of vision, connector and llm is trained; None only evaluates.
        weight_decay: of matrices; vectors are never decayed.
        max_grad_norm: total norm to clip to.
        temperature: of the distributions that log-probs and entropies are of.
        ranks: the processes of the job, all of torch.distributed's default group.
        balanced: ranks share micro-batches by their operations, and not in turn.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        *,
        modules: Mapping[str, bool] | None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        ranks: Ranks = ALONE,
        balanced: bool = False,
    ) -> None:
        self.trained = trained = check_modules(modules)
        self.balanced = balanced
        self.model = model
        self.config = model.config
        self.ranks = self.replicas = self.samplers = ranks
        self.reports = True
        self.tokenizer = tokenizer
        self.max_grad_norm = max_grad_norm
        self.temperature = temperature
        self.trainable: dict[str, nn.Parameter] = {}
        self.parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        for name, part, parameter in named_part_parameters(model):
            parameter.requires_grad_(trained[part])
            if parameter.requires_grad:
                self.trainable[name] = parameter
                self.parts[part].append(parameter)
        if modules is None:
            return
        matrices = [p for p in self.trainable.values() if p.dim() >= 2]
        vectors = [p for p in self.trainable.values() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=betas,
            fused=True,
        )

    def head(self, batch: Batch) -> Head:
        """Return the language head at the tokens of a batch that count; differentiable."""
        batch = batch.to(self.model.device)
        mask = batch.loss_mask
        return Head(
            response_hidden(self.model, batch)[mask],
            self.model.lm_head.weight,
            batch.response_ids[mask],
            mask,
            self.temperature,
        )

    def shares(self, works: Sequence[Work]) -> list[list[int]]:
        """See `contract.Engine.shares`."""
        if self.balanced:
            dims = Dimensions.of(self.config)
            return replica_shares(works, self.ranks.size, dims, self.trained)
        # In turn, since neighbors are alike.
        size = self.ranks.size
        return [list(range(rank, len(works), size)) for rank in range(size)]

    def prepare(self, micro_batches: Sequence[Batch]) -> None:
        """See `contract.Engine.prepare`."""
        cut_ahead(micro_batches)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """See `contract.Engine.evaluate`."""
        cut_ahead(micro_batches)
        found = [self.head(batch).logprobs_and_entropy() for batch in micro_batches]
        return [(logprobs.cpu(), entropy.cpu()) for logprobs, entropy in found]

    def train_step(
        self, micro_batches: Sequence[Batch], loss_fn: LossFn, *, learning_rate: float
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """See `contract.Engine.train_step`."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, outputs = [], []
        cut_ahead(micro_batches)
        for index, batch in enumerate(micro_batches):
            loss, output = loss_fn(self.head(batch), index)
            # A micro-batch without pictures reaches nothing when only the connector is trained.
            if loss.requires_grad:
                loss.backward()
            outputs.append({name: tensor.detach().cpu() for name, tensor in output.items()})
            losses.append(float(loss.detach()))
        total = float(self.ranks.sum(torch.tensor(sum(losses), dtype=torch.float64)))
        self._sum_gradients()
        norms = {part: _norm(parameters) for part, parameters in self.parts.items()}
        norm = math.sqrt(sum(value**2 for value in norms.values()))
        if norm > self.max_grad_norm:
            for parameter in self.trainable.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.max_grad_norm / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            "loss": total,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            **{f"grad_norm_{part}": value for part, value in norms.items()},
        }
        return metrics, outputs

    def _sum_gradients(self) -> None:
        """Sum the gradients of all ranks; a parameter that none of them reached keeps none."""
        if self.ranks.size == 1:
            return
        reached = [p.grad is not None for p in self.trainable.values()]
        anywhere = map(any, zip(*self.ranks.gather(reached), strict=True))
        chosen = [
            p for p, is_reached in zip(self.trainable.values(), anywhere, strict=True) if is_reached
        ]
        if not chosen:
            return
        flat = torch.cat([_gradient(p).flatten() for p in chosen])
        dist.all_reduce(flat)
        for parameter, summed in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def decoder(self) -> HFDecoder:
        """See `contract.Engine.decoder`."""
        return HFDecoder(self.model)

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """See `contract.Engine.export_hf`."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save(self, directory: Path) -> None:
        """See `contract.Engine.save`: model.safetensors, config.json and the tokenizer."""
        self.ranks.on_main(lambda: self._save(directory))

    def _save(self, directory: Path) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.export_hf()}
        save_tensors(directory / "model.safetensors", tensors)
        config = self.model.config.to_dict()
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(str(directory))
        write_serving_files(directory)

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """See `contract.Engine.optimizer_tensors`."""
        return optimizer_tensors(self.optimizer, self.trainable)

    def state_bytes(self) -> int:
        """See `contract.Engine.state_bytes`."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def save_state(self, directory: Path) -> None:
        """See `contract.Engine.save_state`."""
        self.save(directory)

    def load_state(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """See `contract.Engine.load_state`."""
        self.load_weights(directory)
        load_optimizer_tensors(self.optimizer, self.trainable, tensors)

    def load_weights(self, directory: Path) -> None:
        """See `contract.Engine.load_weights`."""
        stored = load_model(directory)
        with torch.no_grad():
            for own, saved in zip(self.model.parameters(), stored.parameters(), strict=True):
                own.copy_(saved)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
