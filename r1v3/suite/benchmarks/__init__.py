"""The benchmarks of table 1, in its order."""

from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks import hallusionbench, mmbench, mmmu, mmstar

BENCHMARKS: dict[str, Benchmark] = {
    one.key: one
    for one in (
        mmmu.BENCHMARK,
        mmstar.BENCHMARK,
        mmbench.BENCHMARK,
        hallusionbench.BENCHMARK,
    )
}
