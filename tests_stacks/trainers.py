"""Parts of trainers that run on a CPU, from their sources: what reads logits and computes losses.

Modules that need far more than is called of them are stood in for. pytest skips a stack whose
source could not be fetched.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

from .sources import do_without, put_on_path, stand_in


def slime() -> ModuleType:
    """slime's losses; of its actor, which needs all of Megatron-LM, the name that it looks up."""
    put_on_path("slime", "slime", "slime.utils", "slime.backends", "slime.backends.megatron_utils")
    loss = importlib.import_module("slime.backends.megatron_utils.loss")
    stand_in(
        "slime.backends.megatron_utils.actor",
        get_log_probs_and_entropy=loss.get_log_probs_and_entropy,
    )
    return loss


def openrlhf() -> ModuleType:
    """OpenRLHF's actor, which scores with torch where flash-attn is not installed."""
    do_without("deepspeed", "flash_attn", "peft")
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]
    put_on_path("openrlhf", "openrlhf", "openrlhf.models")
    return importlib.import_module("openrlhf.models.actor")


def nemo_rl() -> ModuleType:
    """NeMo-RL's functions of logits; its losses can be imported after it."""
    do_without("mlflow", "pynvml", "ray", "requests", "swanlab", "wandb", "zmq")
    put_on_path("nemo-rl", "nemo_rl", "nemo_rl.algorithms", "nemo_rl.distributed", "nemo_rl.models")
    stand_in("nemo_rl.models.policy", TokenizerConfig=dict)
    stand_in("nemo_rl.utils.logger", Logger=object)
    stand_in("nemo_rl.models.dtensor.parallelize", to_local_if_dtensor=lambda tensor: tensor)
    return importlib.import_module("nemo_rl.distributed.model_utils")


def prime_rl() -> ModuleType:
    """prime-rl's heads; its losses can be imported after it, with the custom one of r1v3."""
    trainer = "trainer", "trainer.rl", "trainer.models", "trainer.models.layers"
    packages = [f"prime_rl.{name}" for name in (*trainer, "utils", "configs")]
    put_on_path("prime-rl", "prime_rl", *packages, within="src")
    stand_in(
        "prime_rl.configs.trainer", CustomLossConfig=SimpleNamespace, DefaultLossConfig=dict,
        IPOLossConfig=list, LossConfig=object,
    )  # fmt: skip
    adapter = importlib.import_module("r1v3.integrations.prime_rl")
    stand_in("prime_rl.utils.utils", import_object=lambda path: adapter.policy_loss)
    logger = SimpleNamespace(info=lambda *_: None)
    stand_in("prime_rl.utils.logger", get_logger=lambda: logger)
    stand_in("prime_rl.utils.vlm", get_final_logit_softcapping=lambda config: None)
    return importlib.import_module("prime_rl.trainer.models.layers.lm_head")


def swift_megatron() -> ModuleType:
    """ms-swift's functions of sharded logits, and the name that its trainer looks up."""
    put_on_path("ms-swift", "swift", "swift.megatron", "swift.megatron.trainers")
    functions = importlib.import_module("swift.megatron.trainers.vocab_parallel_utils")
    name = "compute_logps_and_entropy_from_logits"
    stand_in("swift.megatron.trainers.grpo_trainer", **{name: getattr(functions, name)})
    return functions
