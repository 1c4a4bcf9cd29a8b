"""Connector-only tuning after reinforcement learning (report, section 5.6).

The supervised loop with vision tower and language model frozen: cosine schedule, warm-up ratio
0.03, early stopping on the validation loss.
"""

from pathlib import Path

from r1v3.config import Connector
from r1v3.trainer import supervised


def train(config: Connector, *, resuming: bool = False) -> Path:
    """Run the stage; return the model folder `<run>/models/connector`."""
    return supervised.train("connector", config, resuming=resuming)
