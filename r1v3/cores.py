"""The processor's cores that a process may keep busy."""

import os


def cores_of_rank() -> int:
    """Return the CPU cores of this machine for each of its ranks, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
