"""Converting InternVL between HF checkpoints, in either naming, and Megatron's layouts."""

from r1v3.model.conversion.config import load_config
from r1v3.model.conversion.disk import Converted, convert
from r1v3.model.conversion.match import CheckpointError, Report, match
from r1v3.model.conversion.parallel import export_hf, load_hf
from r1v3.model.conversion.reader import Checkpoint
from r1v3.model.conversion.saving import save_hf, write_hf
from r1v3.model.conversion.table import native_shapes, parameter_name, saved_name, weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Converted",
    "Report",
    "convert",
    "export_hf",
    "load_config",
    "load_hf",
    "match",
    "native_shapes",
    "parameter_name",
    "save_hf",
    "saved_name",
    "weights",
    "write_hf",
]
