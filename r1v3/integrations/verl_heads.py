"""For verl's `model.external_lib`, which every worker imports: rebinds the heads of its engines."""

from importlib.util import find_spec

from r1v3.integrations.verl import use_heads

REBOUND = use_heads(megatron=find_spec("megatron") is not None)
