"""Cold-start SFT on rejection-sampled chains of thought (report, section 3.2)."""

from pathlib import Path

from r1v3.config import SFT
from r1v3.trainer import supervised


def train(config: SFT, *, resuming: bool = False) -> Path:
    """Run the stage; return the model folder `<run>/models/sft`."""
    return supervised.train("sft", config, resuming=resuming)
