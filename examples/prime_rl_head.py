"""r1v3's fused head in prime-rl: python examples/prime_rl_head.py

In a run, call `use_head()` in the trainer, and take the clipped loss by its configuration:

    [trainer.loss]
    type = "custom"
    import_path = "r1v3.integrations.prime_rl.policy_loss"
"""

import torch
from prime_rl.trainer.models.layers import lm_head
from transformers import Qwen2Config, Qwen2ForCausalLM

from r1v3.integrations.prime_rl import use_head

model = Qwen2ForCausalLM(
    Qwen2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=300,
        tie_word_embeddings=False,
    )
)
lm_head.inject_prime_lm_head(model, chunk_size=8)  # `fused_lm_head_chunk_size`
ids = torch.randint(0, 300, (1, 20))
with use_head() as rebound:
    print("replaced:", *rebound.names)
    found = model(input_ids=ids, labels=ids.roll(-1, 1), temperature=torch.full((1, 20), 0.7))
found["logprobs"].sum().backward()
print("log-probabilities:", found["logprobs"].shape, "mean entropy:", found["entropy"].mean())
