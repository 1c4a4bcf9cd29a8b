"""The processes and the engine of a stage, as its configuration says."""

import os
from typing import Any

from transformers import PreTrainedTokenizerFast

from r1v3.config import Architecture, Optimizer, Stage
from r1v3.data.tokenizer import IMAGE_CONTEXT, load_tokenizer, token_id
from r1v3.engine.contract import Engine
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.internvl import build_model, internvl_config, load_model
from r1v3.ranks import ALONE, Ranks


def connect(config: Stage) -> Ranks:
    """All processes of the job, of which torchrun started more than one or none.

    Raises:
        ValueError: there are several, and the engine is one process; or their number does not
            fit the parallel layout.
    """
    if config.engine == "megatron":
        from r1v3.engine.megatron.ranks import connect as connect_megatron

        return connect_megatron(config.parallel, device=config.device)
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"engine hf is one process, torchrun started {size}: use engine=megatron")
    return ALONE


def build_engine(
    config: Stage,
    modules: dict[str, bool] | None,
    optimizer: Optimizer,
    ranks: Ranks,
    *,
    architecture: Architecture | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    temperature: float = 1.0,
) -> Engine:
    """The engine of a stage, from a model folder or a fresh architecture with its tokenizer."""
    settings: dict[str, Any] = {
        "modules": modules,
        "weight_decay": optimizer.weight_decay,
        "betas": optimizer.betas,
        "max_grad_norm": optimizer.max_grad_norm,
        "temperature": temperature,
    }
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
        return HFEngine(model, tokenizer, **settings)
    assert config.model is not None
    tokenizer = load_tokenizer(config.model)
    if config.engine == "megatron":
        from r1v3.engine.megatron.engine import MegatronEngine

        return MegatronEngine(config.model, tokenizer, config, ranks, **settings)
    return HFEngine(load_model(config.model, device=config.device), tokenizer, **settings)
