"""InternVL on megatron-core: packed, parallel, trained and decoded in one layout."""
