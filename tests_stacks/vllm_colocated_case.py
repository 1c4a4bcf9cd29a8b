"""GRPO of the demo's model with vLLM in the same process, then its sampler beside local sampling.

    python -m tests_stacks.vllm_colocated_case SAMPLES.parquet SETTING...

The settings are those of `r1v3 grpo`. Prints a line of JSON: the largest difference between the
log-probs of both samplers, for each way of answering, or null where their tokens differ.
"""

import json
import sys

import torch

from r1v3.config import GRPO, Decoding, load
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.evaluation.policy import mode_sampling
from r1v3.rollout.contract import Sampler, Sampling
from r1v3.rollout.local import LocalSampler
from r1v3.trainer.grpo import GRPOTrainer
from tests_stacks.serving import ROOT

TOKENS, BUDGETS = 32, (0, 6)


def ways(trainer: GRPOTrainer) -> dict[str, tuple[Sampling, bool]]:
    """Settings of greedy decoding, and whether a thought is opened, by name."""
    greedy, tokenizer = Decoding(temperature=0.0, max_tokens=TOKENS), trainer.policy.tokenizer
    found = {
        mode: mode_sampling(greedy, ["So", "row"], tokenizer, mode)
        for mode in ("slow", "nothink", "nowait")
    }
    return found | {
        f"budget {budget}": (Sampling(0.0, TOKENS, (), budget), True) for budget in BUDGETS
    }


def difference(
    trainer: GRPOTrainer, samples: list[Sample], sampling: Sampling, thinking: bool
) -> float | None:
    """The largest difference of sampled log-probs of equal greedy answers; None of others."""

    def answers(sampler: Sampler) -> tuple[list[list[int]], torch.Tensor]:
        requests = trainer.policy.requests(samples, thinking)
        generator = torch.Generator().manual_seed(0)
        found = sampler.complete(requests, sampling, generator=generator)
        pairs = zip(found.response_ids, found.mask, strict=True)
        logprobs = found.logprobs * (found.sampled & found.mask)
        return [ids[mask].tolist() for ids, mask in pairs], logprobs

    local = LocalSampler(trainer.engine.decoder(), trainer.sampler.rules, trainer.engine.samplers)
    (wanted, own), (found, theirs) = answers(local), answers(trainer.sampler)
    return float((own - theirs).abs().max()) if wanted == found else None


def main() -> None:
    """Train, compare, print."""
    samples = load_samples(sys.argv[1])[:4]
    config = load(GRPO, ROOT / "configs" / "demo" / "grpo.yaml", sys.argv[2:])
    trainer = GRPOTrainer(config, resuming=False)
    trainer.loop()
    trainer.sampler.update_weights(trainer.engine.export_hf(), trainer.step)
    trainer.sampler.wake()
    found = {name: difference(trainer, samples, *way) for name, way in ways(trainer).items()}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
