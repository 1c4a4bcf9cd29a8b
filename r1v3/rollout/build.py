"""The sampler of a stage, as its configuration says."""

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerFast

from r1v3.config import RolloutEngine, Stage
from r1v3.engine.contract import Decoder
from r1v3.ranks import Ranks
from r1v3.rollout.contract import Sampler, TokenRules
from r1v3.rollout.local import LocalSampler
from r1v3.rollout.vllm_colocated import ColocatedVLLM
from r1v3.rollout.vllm_server import VLLMServers

# Published weights of a run lie here, unless the configuration says where.
WEIGHTS = "rollout-weights"


def build_sampler(
    config: RolloutEngine,
    stage: Stage,
    tokenizer: PreTrainedTokenizerFast,
    *,
    ranks: Ranks,
    max_length: int,
    local: Callable[[], tuple[Decoder, Ranks]],
) -> Sampler:
    """What completes the prompts of a stage.

    Args:
        ranks: all processes of the job.
        max_length: longest prompt and completion together, in tokens.
        local: the live weights and their replicas, asked for only where they sample.
    """
    rules = TokenRules.of(tokenizer)
    if config.engine == "local":
        decoder, replicas = local()
        return LocalSampler(decoder, rules, replicas)
    assert stage.model is not None
    if config.engine == "vllm":
        return ColocatedVLLM(
            stage.model,
            tokenizer,
            max_length=max_length,
            ranks=ranks,
            tensor=config.tensor,
            memory_share=config.memory_share,
            dtype=stage.dtype,
            trust_remote_code=config.trust_remote_code,
        )
    return VLLMServers(
        config.urls,
        rules,
        stage.model,
        weights_folder=config.weights_folder or stage.run / WEIGHTS,
        ranks=ranks,
        dtype=getattr(torch, stage.dtype),
        timeout_seconds=config.timeout_seconds,
        retries=config.retries,
        concurrency=config.concurrency,
    )
