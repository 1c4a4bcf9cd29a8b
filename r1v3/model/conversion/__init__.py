"""InternVL checkpoints as files: reading, checking, renaming and writing them."""

from r1v3.model.conversion.config import load_config
from r1v3.model.conversion.disk import Converted, convert
from r1v3.model.conversion.match import CheckpointError, Report, match
from r1v3.model.conversion.reader import Checkpoint
from r1v3.model.conversion.table import native_shapes, parameter_name, saved_name, weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Converted",
    "Report",
    "convert",
    "load_config",
    "match",
    "native_shapes",
    "parameter_name",
    "saved_name",
    "weights",
]
