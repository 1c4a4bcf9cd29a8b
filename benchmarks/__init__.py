"""Micro-benchmarks of `r1v3.kernels`: `python -m benchmarks --help`."""

import os

# Torch's profiler, which measures memory on the CPU, otherwise writes a log line per use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
