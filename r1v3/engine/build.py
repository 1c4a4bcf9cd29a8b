"""The processes and the engine of a stage, as its configuration says."""

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from r1v3.config import GRPO, Architecture, Modules, Optimizer, Stage, Supervised
from r1v3.data.encoding import model_image_shape
from r1v3.data.special_tokens import IMAGE_CONTEXT
from r1v3.data.tokenizer import load_tokenizer, token_id
from r1v3.engine.contract import Engine
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.conversion import load_config
from r1v3.model.internvl import build_model, internvl_config, load_model
from r1v3.ranks import ALONE, Ranks, join_job

StageT = TypeVar("StageT", bound=Stage)


@dataclass(frozen=True)
class Training:
    """The parts of the model that an engine trains, and the optimizer."""

    modules: Modules
    optimizer: Optimizer


def connect(config: Stage) -> Ranks:
    """Connect the processes of the job, if there are several, and set the CPU threads of this one.

    Only the first rank shows warnings from here on: the others' are the same.

    Raises:
        ValueError: the number of processes does not fit the parallel layout.
    """
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    set_threads(config.threads)
    if config.engine == "megatron":
        from r1v3.engine.megatron.ranks import connect as connect_megatron

        return connect_megatron(config.parallel, device=config.device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    return join_job(config.device, config.parallel.timeout_seconds)


def resolve_max_tiles(config: StageT) -> StageT:
    """Fill in the model's own number of tiles where the configuration leaves it to the model.

    Raises:
        ValueError: the model's config.json is missing or cannot be used.
    """
    if config.max_tiles is not None:
        return config
    own = 1 if config.model is None else model_image_shape(load_config(config.model)).max_tiles
    return config.model_copy(update={"max_tiles": own})


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads; None leaves torch's own choice.

    A run repeats its bits only with the same number of threads.
    """
    if threads is not None:
        torch.set_num_threads(threads)


def build_engine(
    config: Stage,
    ranks: Ranks,
    training: Training | None = None,
    *,
    architecture: Architecture | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    temperature: float = 1.0,
) -> Engine:
    """Build the engine of a stage from its model folder, or from an architecture.

    Args:
        training: None for an engine that only evaluates and decodes.
        architecture: of a model with random weights, in place of the model folder.
        tokenizer: of that model.
        temperature: of the distributions that log-probs and entropies are of.

    Raises:
        ValueError: an architecture with engine megatron.
    """
    settings: dict[str, Any] = {"modules": None, "temperature": temperature}
    if training is not None:
        optimizer = training.optimizer
        settings |= {
            "modules": training.modules.model_dump(),
            "weight_decay": optimizer.weight_decay,
            "betas": optimizer.betas,
            "max_grad_norm": optimizer.max_grad_norm,
        }
    # Without a budget micro-batches are alike, and taken in turn.
    balanced = isinstance(config, GRPO | Supervised) and config.micro_batch_tokens is not None
    if architecture is not None:
        if config.engine != "hf":
            raise ValueError("a fresh `architecture` is trained with engine=hf")
        assert tokenizer is not None
        model = build_model(
            internvl_config(
                vocab_size=len(tokenizer),
                image_token_id=token_id(tokenizer, IMAGE_CONTEXT),
                image_size=architecture.image_size,
                patch_size=architecture.patch_size,
                vision=architecture.vision,
                text=architecture.text,
                rope_theta=architecture.rope_theta,
            ),
            config.seed,
            device=config.device,
        )
        return HFEngine(model, tokenizer, ranks=ranks, balanced=balanced, **settings)
    assert config.model is not None
    tokenizer = load_tokenizer(config.model)
    if config.engine == "megatron":
        from r1v3.engine.megatron.engine import MegatronEngine

        return MegatronEngine(config.model, tokenizer, config, ranks, **settings)
    model = load_model(config.model, device=config.device)
    return HFEngine(model, tokenizer, ranks=ranks, balanced=balanced, **settings)
