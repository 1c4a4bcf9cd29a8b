"""r1v3 reads the logits of slime's Megatron actors: python examples/slime_responses.py

In a run of slime these are flags:

    --custom-megatron-init-path r1v3.integrations.slime.use_head
    --custom-reward-post-process-path r1v3.integrations.slime.group_rewards
    --custom-rm-path r1v3.integrations.slime.reward
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import mpu
from slime.backends.megatron_utils import loss as slime_loss

from r1v3.integrations.slime import use_head

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mpu.initialize_model_parallel()

# Two samples, one after the other: their prompts and responses.
samples = [torch.randint(0, 300, (10,)), torch.randint(0, 300, (14,))]
logits = torch.randn(1, 24, 300, requires_grad=True)
with use_head() as rebound:
    print("replaced:", *rebound.names)
    _, found = slime_loss.get_log_probs_and_entropy(
        logits,
        args=SimpleNamespace(rollout_temperature=0.7, entropy_coef=0.0),
        unconcat_tokens=samples,
        total_lengths=[10, 14],
        response_lengths=[6, 9],
        with_entropy=True,
    )
logprobs = torch.cat(found["log_probs"])
logprobs.sum().backward()
print("log-probabilities of the responses:", *(x.shape[0] for x in found["log_probs"]))
mpu.destroy_model_parallel()
dist.destroy_process_group()
