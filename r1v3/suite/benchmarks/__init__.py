"""The benchmarks of table 1, in its order, and the demo's own questions."""

from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks import (
    digits,
    emma,
    hallusionbench,
    logicvista,
    mathverse,
    mathvision,
    mathvista,
    mmbench,
    mme_reasoning,
    mmk12,
    mmmu,
    mmmu_pro,
    mmstar,
    phyx,
    seephys,
    visulogic,
    wemath,
)

BENCHMARKS: dict[str, Benchmark] = {
    one.key: one
    for one in (
        mmmu.BENCHMARK,
        emma.BENCHMARK,
        mmmu_pro.TEN_OPTIONS,
        mmmu_pro.VISION,
        mmk12.BENCHMARK,
        mmstar.BENCHMARK,
        mmbench.BENCHMARK,
        hallusionbench.BENCHMARK,
        mathvista.BENCHMARK,
        mathverse.BENCHMARK,
        mathvision.BENCHMARK,
        wemath.BENCHMARK,
        visulogic.BENCHMARK,
        logicvista.BENCHMARK,
        mme_reasoning.BENCHMARK,
        phyx.BENCHMARK,
        seephys.BENCHMARK,
        digits.BENCHMARK,
    )
}
