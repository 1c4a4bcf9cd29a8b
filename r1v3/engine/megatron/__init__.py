"""The engine on megatron-core: tensor, sequence, pipeline and data parallelism."""
