"""r1v3 reads the logits of OpenRLHF's actor: python examples/openrlhf_actor.py

In a run, every Ray worker calls `use_head`, and the reward is the adapter's file:

    ray job submit --runtime-env-json \
        '{"worker_process_setup_hook": "r1v3.integrations.openrlhf.use_head"}' -- ...
    --reward.remote_url .../r1v3/integrations/openrlhf.py
"""

import torch
from openrlhf.models.actor import Actor
from transformers import Qwen2Config, Qwen2ForCausalLM

from r1v3.integrations.openrlhf import reward_func, use_head

model = Qwen2ForCausalLM(
    Qwen2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=400,
    )
)
actor = Actor(model, temperature=0.7)
actor.packing_samples = False
sequences = torch.randint(0, 400, (3, 9))
attention = torch.ones_like(sequences)
with use_head() as rebound:
    print("replaced:", *rebound.names)
    logprobs, output = actor(
        sequences, attention[:, 4:], attention, return_output=True, return_entropy=True
    )
logprobs.sum().backward()
print("log-probabilities of five actions:", logprobs.shape, "mean entropy:", output.entropy.mean())
graded = reward_func(["3+4?7</think>\n\n\\boxed{7}"], ["3+4?"], ["7"])
print("reward:", graded["rewards"])
