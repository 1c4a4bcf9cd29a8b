"""The layouts that MegatronEngine is tested in, and the parts that are trained."""

from r1v3.config import Parallel
from r1v3.model.parts import PARTS

# Processes of the job that runs them all.
WORLD = 4
SPLIT = Parallel(tensor=2, pipeline=2)
# Ranks and layout; data parallelism is what is left.
LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "tp1": (1, Parallel()),
    "tp2": (2, Parallel(tensor=2)),
    "pp2": (2, Parallel(pipeline=2)),
    "tp2_sequence": (2, Parallel(tensor=2, sequence=True)),
    "dp2": (2, Parallel()),
    "dp2_whole_optimizer": (2, Parallel(distributed_optimizer=False)),
    "tp2_pp2": (4, SPLIT),
    "tp4": (4, Parallel(tensor=4)),
    "dp4_idle_replica": (4, Parallel()),
    "cp2": (2, Parallel(context=2)),
    "cp2_tp2": (4, Parallel(context=2, tensor=2, sequence=True)),
    "cp2_pp2": (4, Parallel(context=2, pipeline=2, recompute="full")),
    "cp2_dp2_whole_optimizer": (4, Parallel(context=2, distributed_optimizer=False)),
    "cp4": (4, Parallel(context=4)),
    "tp2_pp2_recompute": (4, Parallel(tensor=2, pipeline=2, sequence=True, recompute="full")),
}
OTHER_LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "tp1": (1, Parallel()),
    "tp4": (4, Parallel(tensor=4)),
    "dp2_pp2": (4, Parallel(pipeline=2)),
    "cp2_dp2": (4, Parallel(context=2)),
}
# The report's; "connector and language model" is what "vision frozen" is.
PATTERNS: dict[str, tuple[str, ...]] = {
    "connector": ("connector",),
    "connector_llm": ("connector", "llm"),
    "vision_llm": ("vision", "llm"),
    "all": PARTS,
}


def only(parts: tuple[str, ...]) -> dict[str, bool]:
    """Modules that train these parts."""
    return {part: part in parts for part in PARTS}
