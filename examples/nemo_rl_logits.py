"""r1v3 in NeMo-RL's functions of sharded logits: python examples/nemo_rl_logits.py

In a run, call `use_head()` in every worker before it trains.
"""

import torch
import torch.distributed as dist
from nemo_rl.distributed import model_utils

from r1v3.integrations.nemo_rl import use_head

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
logits = torch.randn(3, 8, 300, requires_grad=True)  # this rank's columns of the vocabulary
tokens = torch.randint(0, 300, (3, 8))
with use_head() as rebound:
    print("replaced:", *rebound.names)
    logprobs = model_utils.from_parallel_logits_to_logprobs(
        logits, tokens, 0, 300, dist.group.WORLD
    )
logprobs.sum().backward()
print("log-probabilities of the next tokens:", logprobs.shape)
dist.destroy_process_group()
