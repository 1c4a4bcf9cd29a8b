"""r1v3's head and loss where verl looks up its own: python examples/verl_head_and_loss.py

In a run of verl these are settings:

    actor_rollout_ref.model.external_lib=r1v3.integrations.verl_heads
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.actor.policy_loss.loss_mode=r1v3_grpo
    algorithm.adv_estimator=r1v3_group
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers import dense_common
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from r1v3.integrations.verl import use_heads

model = Qwen2ForCausalLM(
    Qwen2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=500,
    )
)
ids = torch.randint(0, 500, (4, 11))
with use_heads() as rebound:
    print("replaced:", *rebound.names)
    # With use_fused_kernels, verl gives this forward to the model.
    output = dense_common.forward_with_torch_backend(
        model, input_ids=ids, temperature=0.8, return_dict=True
    )
logprobs = output.log_probs.view(4, 11)
config = ActorConfig(
    strategy="fsdp",
    rollout_n=4,
    ppo_micro_batch_size_per_gpu=1,
    clip_ratio=0.2,
    clip_ratio_low=0.2,
    clip_ratio_high=0.28,
    clip_ratio_c=3.0,
)
loss, metrics = get_policy_loss_fn("r1v3_grpo")(
    old_log_prob=logprobs.detach() - 0.1,
    log_prob=logprobs,
    advantages=torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None].expand(4, 11),
    response_mask=torch.arange(11).expand(4, 11) > 3,
    loss_agg_mode="token-mean",
    config=config,
)
loss.backward()
print("loss:", loss.item(), metrics)
