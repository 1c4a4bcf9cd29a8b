"""The stages of a run by the verb of the command line, and what several of them derive."""

from r1v3.config.base import Section
from r1v3.config.data import Data
from r1v3.config.stages import GRPO, SFT, Connector, Evaluate, Select
from r1v3.config.suite import Suite

STAGES: dict[str, type[Section]] = {
    "data": Data,
    "sft": SFT,
    "grpo": GRPO,
    "connector": Connector,
    "select": Select,
    "eval": Evaluate,
}


def modes_of(config: Evaluate | Suite) -> list[str]:
    """The decoding modes of a configuration in the order of its tables, budgets last."""
    return [*config.modes, *(f"budget-{n}" for n in config.budgets)]
