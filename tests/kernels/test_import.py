"""Modules that `import r1v3.kernels` brings along."""

import subprocess
import sys

CHECK = """
import sys
import r1v3.kernels
for name in ("megatron", "transformers", "vllm", "pydantic", "r1v3.trainer", "r1v3.model"):
    assert name not in sys.modules, name
names = [n for n in dir(r1v3.kernels) if n in r1v3.kernels.__all__]
assert sorted(names) == sorted(r1v3.kernels.__all__) and len(names) == 10, names
"""


def test_importing_the_kernels_loads_nothing_else() -> None:
    """Fails if another stack that wants one kernel has to install a trainer's dependencies."""
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
