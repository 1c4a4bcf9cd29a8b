"""The sampler that a stage's configuration names."""

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerFast

from r1v3.config import RolloutEngine, Stage
from r1v3.data.encoding import model_image_shape
from r1v3.engine.contract import Decoder
from r1v3.model.conversion import load_config
from r1v3.ranks import Ranks
from r1v3.rollout.contract import Sampler, TokenRules
from r1v3.rollout.copies import Copies
from r1v3.rollout.local import LocalSampler
from r1v3.rollout.server_pool import ServerLimits
from r1v3.rollout.vllm_colocated import ColocatedVLLM
from r1v3.rollout.vllm_server import VLLMServers

# Folder below the run for published weights, unless the configuration names another.
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
    """Build the sampler of a stage.

    Args:
        ranks: all processes of the job.
        max_length: longest prompt and completion together, in tokens.
        local: returns the live decoder and the ranks that hold the same part of the model as this
            one, which share prompts; called only for engine local.
    """
    rules = TokenRules.of(tokenizer)
    if config.engine == "local":
        decoder, replicas = local()
        return LocalSampler(decoder, rules, Copies.over(ranks, replicas.rank))
    assert stage.model is not None
    # vLLM cuts pictures as the folder says, unless a request has a number of its own.
    own = model_image_shape(load_config(stage.model)).max_tiles
    tiles = None if stage.max_tiles in (None, own) else stage.max_tiles
    if config.engine == "vllm":
        return ColocatedVLLM(
            stage.model,
            tokenizer,
            max_length=max_length,
            ranks=ranks,
            tensor=config.tensor,
            memory_share=config.memory_share,
            dtype=stage.dtype,
            max_tiles=tiles,
            arguments={**config.vllm, "trust_remote_code": config.trust_remote_code},
        )
    return VLLMServers(
        config.urls,
        rules,
        stage.model,
        weights_folder=config.weights_folder or stage.run / WEIGHTS,
        ranks=ranks,
        dtype=getattr(torch, stage.dtype),
        max_tiles=tiles,
        limits=ServerLimits(config.timeout_seconds, config.retries, config.concurrency),
    )
