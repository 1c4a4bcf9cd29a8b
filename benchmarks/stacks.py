"""Other stacks' own heads and processors against r1v3's: CPU time, error, peak memory.

    .venvs/trl/bin/python -m benchmarks.stacks --stack trl --stack transformers
    .venvs/verl/bin/python -m benchmarks.stacks --stack verl
    .venvs/trainers/bin/python -m benchmarks.stacks --stack trainers

in the environments that `make test-stacks` builds. Each number comes from a process of its own with
one thread, after a first run that compiles what a stack compiles: the smallest CPU time of several
runs, forward and backward; the largest memory beyond what the process held before a run; the
largest error of any result or gradient, relative to the largest value, against float64. The rows
are written to benchmarks/results.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from r1v3.integrations.versions import TESTED

RESULTS = Path(__file__).resolve().parent / "results"
VARIANTS = ("stock", "r1v3")
Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape of what a stack computes.

    Attributes:
        stack: of `--stack`.
        op: of `OPS`.
        rows, hidden, vocabulary: sizes; hidden is 0 where logits are given.
    """

    stack: str
    op: str
    rows: int
    hidden: int
    vocabulary: int
    dtype: str = "float32"


CASES = [
    *(Case("trl", "head", 256, 256, v) for v in (1_000, 32_000, 151_936)),
    Case("trl", "head", 256, 256, 151_936, "bfloat16"),
    *(Case("verl", "fsdp head", 256, 256, v) for v in (1_000, 32_000, 151_936)),
    Case("verl", "fsdp head", 256, 256, 151_936, "bfloat16"),
    *(Case("verl", "megatron logits", 64, 0, v) for v in (1_000, 32_000, 151_936)),
    Case("verl", "megatron logits", 64, 0, 151_936, "bfloat16"),
    *(Case("transformers", "nowait", 64, 0, v) for v in (1_000, 32_000, 151_936)),
    *(
        Case("trainers", op, 64, 0, v)
        for op in ("slime", "OpenRLHF", "NeMo-RL", "ms-swift, Megatron")
        for v in (1_000, 151_936)
    ),
    *(
        Case("trainers", op, 64, 256, v)
        for op in ("NeMo-RL, hidden states", "prime-rl")
        for v in (1_000, 151_936)
    ),
]


def upstream(case: Case) -> Tensor:
    """Upstream gradients [2, rows] of log-probabilities and entropies."""
    return torch.randn(2, case.rows, generator=torch.Generator().manual_seed(2))


def head_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels."""
    seed = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.rows, case.hidden, generator=seed).to(dtype)
    weight = (torch.randn(case.vocabulary, case.hidden, generator=seed) * 0.05).to(dtype)
    return hidden, weight, torch.randint(0, case.vocabulary, (case.rows,), generator=seed)


def logits_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and temperatures."""
    seed = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case.dtype)
    logits = (torch.randn(1, case.rows, case.vocabulary, generator=seed) * 3).to(dtype)
    label = torch.randint(0, case.vocabulary, (1, case.rows), generator=seed)
    return logits, label, torch.rand(1, case.rows, generator=seed) + 0.5


def definition(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as they are defined."""
    logs = logits.log_softmax(-1)
    return logs.gather(-1, label[..., None])[..., 0], -(logs.exp() * logs).sum(-1)


def backward(case: Case, outputs: tuple[Tensor, Tensor], *leaves: Tensor) -> list[Tensor]:
    """Results and gradients."""
    up = upstream(case)
    (outputs[0].reshape(-1) * up[0]).sum().add((outputs[1].reshape(-1) * up[1]).sum()).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [each.detach() for each in (*outputs, *gradients)]


def of_head(case: Case, head: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Run, Run]:
    """A run of a head (hidden, weight, labels) and the truth."""
    hidden, weight, ids = head_inputs(case)

    def run(to: torch.dtype, head: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        x, y = (each.detach().clone().to(to).requires_grad_() for each in (hidden, weight))
        return backward(case, head(x, y, ids), x, y)

    truth = lambda x, y, ids: definition(x @ y.T, ids)  # noqa: E731
    return lambda: run(hidden.dtype, head), lambda: run(torch.float64, truth)


def trl_head(case: Case, variant: str) -> tuple[Run, Run]:
    """The fused head of TRL's trainers, log-probabilities and entropies."""
    from trl.trainer import utils

    from r1v3.integrations.trl import use_head

    if variant == "r1v3":
        use_head()
    outputs = ("log_probs", "entropy")

    def head(x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        apply = utils._ChunkedLogProbFunction.apply
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        return tuple(apply(x, y, None, ids, 1.0, chunk, None, 1.0, outputs)[:2])

    return of_head(case, head)


def verl_head(case: Case, variant: str) -> tuple[Run, Run]:
    """The fused head of verl's FSDP engine."""
    from verl.utils.experimental import torch_functional

    from r1v3.integrations.verl import use_heads

    if variant == "r1v3":
        use_heads()
    return of_head(case, torch_functional.FusedLinearForPPO())


def one_rank() -> None:
    """Make Megatron's groups, of this process alone."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()


def verl_logits(case: Case, variant: str) -> tuple[Run, Run]:
    """The logits of verl's Megatron engine, on one rank."""
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead as Engine

    from r1v3.integrations.verl import use_heads

    one_rank()
    if variant == "r1v3":
        use_heads(megatron=True)
    logits, label, temperature = logits_inputs(case)
    engine = SimpleNamespace(engine_config=SimpleNamespace(entropy_from_logits_with_chunking=False))

    def run() -> list[Tensor]:
        leaf = logits.detach().clone().requires_grad_()
        out = Engine._lm_head_logits_processor(
            engine, leaf * 1, label, temperature.clone(), calculate_sum_pi_squared=False,
            calculate_entropy=True, distillation_use_topk=False, distillation_only=False,
            logits_processor_func=None, batch=None, data_format="thd",
        )  # fmt: skip
        return backward(case, (out["log_probs"], out["entropy"]), leaf)

    def truth() -> list[Tensor]:
        leaf = logits.double().requires_grad_()
        scaled = leaf / temperature.double()[..., None]
        return backward(case, definition(scaled, label), leaf)

    return run, truth


def of_logits(case: Case, head: Callable[..., Any], prompt: int = 0) -> tuple[Run, Run]:
    """A run of a head (logits [1, rows, V], labels) and the truth, after the rows of a prompt.

    A head returns log-probabilities and entropies, or log-probabilities and None.
    """
    logits, label, _ = logits_inputs(case)
    up = upstream(case)

    def run(to: torch.dtype, head: Callable[..., Any]) -> list[Tensor]:
        leaf = logits.detach().clone().to(to).requires_grad_()
        found = [each.reshape(-1) for each in head(leaf * 1, label) if each is not None]
        sums = [(each * w[: len(each)]).sum() for each, w in zip(found, up, strict=False)]
        torch.stack(sums).sum().backward()
        assert leaf.grad is not None
        return [*(each.detach() for each in found), leaf.grad]

    stock = head(logits.clone(), label)
    rows = slice(prompt, prompt + stock[0].numel())

    def truth(leaf: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return definition(leaf[0, rows], label[0, rows])[: 1 if stock[1] is None else 2]

    return lambda: run(logits.dtype, head), lambda: run(torch.float64, truth)


def slime_logits(case: Case, variant: str) -> tuple[Run, Run]:
    """The logits of a sample of slime, of which three quarters are its prompt, as with pictures."""
    from r1v3.integrations.slime import use_head
    from tests_stacks import trainers

    loss = trainers.slime()
    one_rank()
    if variant == "r1v3":
        use_head()
    arguments = SimpleNamespace(log_probs_chunk_size=-1, allgather_cp=False, entropy_coef=0.01)
    prompt = case.rows * 3 // 4

    def head(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([label[0, :1], label[0, :-1]])  # the last row predicts nothing
        _, found = loss.get_log_probs_and_entropy(
            logits, args=arguments, unconcat_tokens=[tokens], total_lengths=[case.rows],
            response_lengths=[case.rows - prompt - 1], with_entropy=True,
        )  # fmt: skip
        return found["log_probs"][0], found["entropy"][0]

    return of_logits(case, head, prompt)


def openrlhf_logits(case: Case, variant: str) -> tuple[Run, Run]:
    """The logits of OpenRLHF's actor."""
    from r1v3.integrations.openrlhf import use_head
    from tests_stacks import trainers

    actor = trainers.openrlhf()
    if variant == "r1v3":
        use_head()
    return of_logits(
        case, lambda x, ids: (actor.log_probs_from_logits(x, ids), actor.compute_entropy(x))
    )


def nemo_rl(variant: str) -> tuple[Any, Any]:
    """NeMo-RL's functions, and the group that they are called with."""
    from r1v3.integrations.nemo_rl import use_head
    from tests_stacks import trainers

    functions = trainers.nemo_rl()
    one_rank()
    if variant == "r1v3":
        use_head()
    return functions, torch.distributed.group.WORLD


def nemo_rl_logits(case: Case, variant: str) -> tuple[Run, Run]:
    """Sharded logits of NeMo-RL, on one rank; it computes no entropy beside them."""
    functions, group = nemo_rl(variant)

    def head(x: Tensor, ids: Tensor) -> tuple[Tensor, None]:
        target = ids.roll(1, -1)  # which the function rolls back
        found = functions.from_parallel_logits_to_logprobs(x, target, 0, case.vocabulary, group)
        return found, None

    return of_logits(case, head)


def log_probs_of_head(
    case: Case, head: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Run, Run]:
    """A run of a head (hidden, weight, labels) whose log-probabilities alone have a gradient."""
    hidden, weight, ids = head_inputs(case)
    up = upstream(case)[0]

    def run(to: torch.dtype, head: Callable[..., Tensor]) -> list[Tensor]:
        x, y = (each.detach().clone().to(to).requires_grad_() for each in (hidden, weight))
        logprobs = head(x, y, ids).reshape(-1)
        (logprobs * up[: len(logprobs)]).sum().backward()
        assert x.grad is not None and y.grad is not None
        return [each.detach() for each in (logprobs, x.grad, y.grad)]

    rows = head(hidden, weight, ids).numel()
    truth = lambda x, y, ids: definition(x @ y.T, ids)[0][:rows]  # noqa: E731
    return lambda: run(hidden.dtype, head), lambda: run(torch.float64, truth)


def nemo_rl_hidden(case: Case, variant: str) -> tuple[Run, Run]:
    """Hidden states of NeMo-RL, a quarter of the sequence at a time."""
    functions, group = nemo_rl(variant)

    def head(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        return functions.from_parallel_hidden_states_to_logprobs(
            x[:, None], y, False, ids.roll(1)[None], 0, case.vocabulary, group,
            chunk_size=case.rows // 4,
        )  # fmt: skip

    return log_probs_of_head(case, head)


def prime_rl_head(case: Case, variant: str) -> tuple[Run, Run]:
    """The fused head of prime-rl, whose entropy has no gradient."""
    from r1v3.integrations.prime_rl import use_head
    from tests_stacks import trainers

    module = trainers.prime_rl().FusedOutputLinear
    if variant == "r1v3":
        use_head()
    ones = torch.ones(1, case.rows)

    def head(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        layer = SimpleNamespace(weight=y, chunk_size=8192)
        return module.forward(layer, x[None], ids[None], ones)["logprobs"]

    return log_probs_of_head(case, head)


def swift_logits(case: Case, variant: str) -> tuple[Run, Run]:
    """The logits of ms-swift's Megatron trainers, on one rank."""
    from r1v3.integrations.swift import use_head
    from tests_stacks import trainers

    functions = trainers.swift_megatron()
    one_rank()
    if variant == "r1v3":
        use_head(megatron=True)
    return of_logits(
        case, lambda x, ids: functions.compute_logps_and_entropy_from_logits(x, ids, True)
    )


def nowait(case: Case, variant: str) -> tuple[Run, Run]:
    """60 banned tokens, against transformers' own processor."""
    from transformers import SuppressTokensLogitsProcessor

    from r1v3.integrations.transformers import NoWait

    scores = logits_inputs(case)[0][0]
    banned = torch.randperm(case.vocabulary, generator=torch.Generator().manual_seed(3))[:60]
    processor: Any = SuppressTokensLogitsProcessor(banned.tolist())
    if variant == "r1v3":
        processor = NoWait.__new__(NoWait)
        processor.token_ids, processor.enabled = banned, None
    prompt = torch.zeros(case.rows, 1, dtype=torch.int64)

    def truth() -> list[Tensor]:
        out = scores.clone()
        out[:, banned] = -torch.inf
        return [out.exp()]

    return lambda: [processor(prompt, scores).exp()], truth


OPS: dict[tuple[str, str], Callable[[Case, str], tuple[Run, Run]]] = {
    ("trl", "head"): trl_head,
    ("verl", "fsdp head"): verl_head,
    ("verl", "megatron logits"): verl_logits,
    ("transformers", "nowait"): nowait,
    ("trainers", "slime"): slime_logits,
    ("trainers", "OpenRLHF"): openrlhf_logits,
    ("trainers", "NeMo-RL"): nemo_rl_logits,
    ("trainers", "NeMo-RL, hidden states"): nemo_rl_hidden,
    ("trainers", "prime-rl"): prime_rl_head,
    ("trainers", "ms-swift, Megatron"): swift_logits,
}


def held_mebibytes() -> float:
    """The memory that this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def extra_mebibytes(run: Run) -> float:
    """The largest memory during a run beyond what was held before, sampled every millisecond."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed
    before = peak = held_mebibytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, held_mebibytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return peak - before


def measure(case: Case, variant: str, repetitions: int) -> dict[str, float]:
    """CPU seconds, extra memory and error of one variant; needs a fresh process."""
    torch.set_num_threads(1)
    run, truth = OPS[case.stack, case.op](case, variant)
    found = run()  # and whatever is compiled
    extra = extra_mebibytes(run)
    seconds = []
    for _ in range(repetitions):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    errors = [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, truth(), strict=True)
    ]
    return {"cpu_seconds": min(seconds), "extra_mib": extra, "error": max(errors)}


def versions(stacks: list[str]) -> dict[str, str]:
    """Of everything that was measured."""
    installed = ["torch", *(stack for stack in stacks if stack != "trainers")]
    if {"trainers", "verl"} & {*stacks}:
        installed.append("megatron-core")
    found = {name: importlib.metadata.version(name) for name in installed}
    if "trainers" in stacks:  # of which the sources are unpacked, not installed
        sources = "slime", "openrlhf", "nemo-rl", "prime-rl", "ms-swift"
        found |= {name: TESTED[name] for name in sources}
    return found


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = sorted({case.stack for case in CASES})
    parser.add_argument("--stack", action="append", choices=known, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    print(versions(arguments.stack))
    print("| stack, op | shape | stock s | r1v3 s | gain | error stock, r1v3 | MiB stock, r1v3 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as fresh:
        for case in (case for case in CASES if case.stack in arguments.stack):
            stock, ours = (
                fresh.submit(measure, case, variant, arguments.repetitions).result()
                for variant in VARIANTS
            )
            rows.append({**case.__dict__, "stock": stock, "r1v3": ours})
            shape = " x ".join(
                f"{size:,}" for size in (case.rows, case.hidden, case.vocabulary) if size
            )
            print(
                f"| {case.stack} {case.op} | {shape} {case.dtype} | {stock['cpu_seconds']:.3g} | "
                f"{ours['cpu_seconds']:.3g} | {stock['cpu_seconds'] / ours['cpu_seconds']:.2g} | "
                f"{stock['error']:.0e}, {ours['error']:.0e} | "
                f"{stock['extra_mib']:.0f}, {ours['extra_mib']:.0f} |",
                flush=True,
            )
    torch.set_num_threads(1)
    facts = {**machine.header("cpu"), "versions": versions(arguments.stack)}
    name = f"stacks_{'_'.join(arguments.stack)}_{facts['date'][:10].replace('-', '')}"
    path = RESULTS / f"{name}_{facts['commit'][:12]}.json"
    path.write_text(json.dumps({"header": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
