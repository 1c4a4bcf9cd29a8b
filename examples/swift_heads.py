"""r1v3 in ms-swift, as a file for --external_plugins

swift rlhf --rlhf_type grpo --external_plugins examples/swift_heads.py --reward_funcs r1v3 ...
"""

from r1v3.integrations.swift import register_reward, use_head

rebound = use_head()  # use_head(megatron=True) for `megatron rlhf`
register_reward()
