"""The versions of other stacks that the adapters were written for and are tested with."""

TESTED = {
    "torch": "2.13.0",
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "verl": "0.9.1",
    "megatron-core": "0.16.1",
}
