"""The parts of the adapters that need no other stack."""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from r1v3.integrations import nemo_rl, openrlhf, prime_rl, slime, swift, trl, verl, vllm
from r1v3.integrations.rebinding import Rebound, parameters_of

ABSENT = {
    "slime": lambda: slime.use_head(),
    "openrlhf": lambda: openrlhf.use_head(),
    "nemo_rl": lambda: nemo_rl.use_head(),
    "prime_rl": lambda: prime_rl.use_head(),
    "swift": lambda: swift.use_head(),
    "swift, Megatron": lambda: swift.use_head(megatron=True),
    "swift's rewards": lambda: swift.register_reward(),
    "trl": lambda: trl.use_head(),
    "verl": lambda: verl.use_heads(),
    "verl, Megatron": lambda: verl.use_heads(megatron=True),
    "verl's registries": lambda: verl.register(),
    "vllm": lambda: vllm.NoWait,
}


@pytest.mark.parametrize("stack", ABSENT)
def test_a_stack_that_is_not_there_is_named(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an adapter imports its stack before it is used, or hides that it is missing."""

    class Absent:
        """A finder that knows that these are not installed."""

        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name in {stack.split("'")[0].split(",")[0] for stack in ABSENT}:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=stack.split("'")[0].split(",")[0]):
        ABSENT[stack]()


# Names that an adapter replaces, with the parameters of the version that it was written for.
HEAD = "ctx, vocab_parallel_logits, target, vocab_start_index, vocab_end_index"
RESPONSES = (
    "logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, "
    "non_loss_data=True, top_p_token_ids=None, top_p_token_offsets=None"
)
NEXT_TOKEN = (
    "input_ids, next_token_logits, seq_index=None, vocab_parallel_rank=None, "
    "vocab_parallel_group=None, context_parallel_group=None, sampling_params=None, chunk_size=None"
)
SHARDED = "logits, labels, compute_entropy=False, entropy_chunk_size=512"
SIGNATURES: dict[str, tuple[Callable[[], Rebound], dict[str, str]]] = {
    "slime": (
        slime.use_head,
        {
            "slime.backends.megatron_utils.loss.calculate_log_probs_and_entropy": (
                "logits, tokens, tp_group, with_entropy=False, chunk_size=-1, "
                "log_prob_keep_mask=None, with_entropy_grad=True"
            ),
            "slime.backends.megatron_utils.loss.get_log_probs_and_entropy": RESPONSES,
            "slime.backends.megatron_utils.actor.get_log_probs_and_entropy": RESPONSES,
        },
    ),
    "openrlhf": (
        openrlhf.use_head,
        {
            "openrlhf.models.actor.log_probs_from_logits": "logits, labels, temperature=1.0",
            "openrlhf.models.actor.compute_entropy": "logits",
        },
    ),
    "nemo_rl": (
        nemo_rl.use_head,
        {
            "nemo_rl.distributed.model_utils.DistributedLogprob.forward": (
                f"{HEAD}, group, inference_only=False"
            ),
            "nemo_rl.distributed.model_utils.ChunkedDistributedLogprob.forward": (
                f"{HEAD}, chunk_size, tp_group, inference_only=False"
            ),
            "nemo_rl.distributed.model_utils.ChunkedDistributedEntropy.forward": (
                "ctx, vocab_parallel_logits, chunk_size, tp_group, inference_only=False"
            ),
            "nemo_rl.distributed.model_utils.ChunkedDistributedHiddenStatesToLogprobs.forward": (
                "ctx, tensor_parallel_hidden_states, target, output_weight_layer, "
                "vocab_start_index, vocab_end_index, chunk_size, tp_group, inference_only=False"
            ),
            "nemo_rl.distributed.model_utils.get_next_token_logprobs_from_logits": NEXT_TOKEN,
            "nemo_rl.algorithms.loss.utils.get_next_token_logprobs_from_logits": NEXT_TOKEN,
        },
    ),
    "prime_rl": (
        prime_rl.use_head,
        {
            "prime_rl.trainer.models.layers.lm_head.FusedOutputLinear.forward": (
                "self, hidden_states, labels=None, temperature=None"
            )
        },
    ),
    "swift": (
        swift.use_head,
        {
            "swift.rlhf_trainers.grpo_trainer.selective_log_softmax": "logits, index",
            "swift.rlhf_trainers.rlhf_mixin.selective_log_softmax": "logits, index",
            "swift.rlhf_trainers.grpo_trainer.entropy_from_logits": "logits, chunk_size=1",
        },
    ),
    "swift, Megatron": (
        lambda: swift.use_head(megatron=True),
        {
            f"swift.megatron.trainers.{module}.compute_logps_and_entropy_from_logits": SHARDED
            for module in ("vocab_parallel_utils", "grpo_trainer")
        },
    ),
}


def stand_in(names: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Make modules with functions, or classes with methods, of these parameters importable."""
    for name, parameters in names.items():
        path = name.split(".")
        depth = next((i for i, part in enumerate(path) if part[:1].isupper()), len(path) - 1)
        for end in range(1, depth + 1):
            dotted = ".".join(path[:end])
            if dotted not in sys.modules:
                module = ModuleType(dotted)
                module.__path__ = []  # type: ignore[attr-defined]
                patch.setitem(sys.modules, dotted, module)
        owner: Any = sys.modules[".".join(path[:depth])]
        scope: dict[str, Any] = {}
        exec(f"def {path[-1]}({parameters}): return 'stock'", scope)
        if depth < len(path) - 1:
            method = scope[path[-1]]
            member = staticmethod(method) if parameters.startswith("ctx") else method
            setattr(owner, path[depth], type(path[depth], (), {path[-1]: member}))
        else:
            setattr(owner, path[-1], scope[path[-1]])


def found(name: str) -> Any:
    """The object of a full name."""
    parts = name.split(".")
    depth = max(i for i in range(len(parts)) if ".".join(parts[:i]) in sys.modules)
    owner = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        owner = getattr(owner, part)
    return owner


@pytest.mark.parametrize("stack", SIGNATURES)
def test_every_call_of_the_stack_reaches_what_replaces_it(
    stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a call that stock takes, by position or by name, is an error of its replacement."""
    use, names = SIGNATURES[stack]
    stand_in(names, monkeypatch)
    stock = {name: found(name) for name in names}
    with use() as rebound:
        assert len(rebound.names) == len(names)
        for name, function in stock.items():
            parameters = list(inspect.signature(function).parameters.values())
            if parameters[0].name == "ctx":  # of an autograd function, `apply` is called
                ours = inspect.signature(found(name.removesuffix(".forward")).apply)
                ours.bind(*parameters[1:])
                ours.bind(*[p for p in parameters[1:] if p.default is p.empty])
            else:
                ours = inspect.signature(found(name))
                ours.bind(0, **{p.name: 0 for p in parameters[1:]})
                ours.bind(0, **{p.name: 0 for p in parameters[1:] if p.default is p.empty})
    assert {name: found(name) for name in names} == stock


@pytest.mark.parametrize("stack", SIGNATURES)
def test_another_signature_is_refused_with_versions(
    stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a stack's next version is patched where it takes another argument."""
    use, names = SIGNATURES[stack]
    last = list(names)[-1]
    changed = names[last].replace("*, ", "") + ", extra=None"
    stand_in({**names, last: changed}, monkeypatch)
    stock = {name: found(name) for name in names}
    with pytest.raises(RuntimeError, match=r"adapter was written for [\w-]+ \d+\.\d+") as stop:
        use()
    assert f"({parameters_of(stock[last])})" in str(stop.value)
    assert {name: found(name) for name in names} == stock


@pytest.mark.parametrize("name", ["Nowait", "NoWait2", "thoughtbudget", "LogitsProcessor"])
def test_other_names_of_the_vllm_adapter_are_attribute_errors(name: str) -> None:
    """Fails if a misspelled class path gives another error than any module would."""
    with pytest.raises(AttributeError, match=name):
        getattr(vllm, name)


@pytest.mark.parametrize(
    ("mode", "counts", "wanted"),
    [
        ("token-mean", {}, ("token-mean", 5)),
        ("token-mean", {"batch_num_tokens": 50, "dp_size": 4}, ("token-mean", 12.5)),
        ("token-sum", {}, ("constant", 1)),
        ("token-sum", {"dp_size": 4}, ("constant", 0.25)),
        ("seq-mean-token-mean", {}, ("sequence-mean", 2)),
        ("seq-mean-token-mean", {"global_batch_size": 8, "dp_size": 2}, ("sequence-mean", 4)),
        ("seq-mean-token-sum", {}, ("sequence-sum", 2)),
        ("seq-mean-token-sum", {"global_batch_size": 8, "dp_size": 2}, ("sequence-sum", 4)),
        ("seq-mean-token-sum-norm", {}, ("sequence-sum", 2 * 4)),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 100}, ("sequence-sum", 2 * 100)),
        (
            "seq-mean-token-sum-norm",
            {"global_batch_size": 8, "dp_size": 2, "loss_scale_factor": 10},
            ("sequence-sum", 40),
        ),
    ],
)
def test_normalizers_of_verl(mode: str, counts: dict[str, Any], wanted: tuple[str, float]) -> None:
    """Fails if a loss_agg_mode of verl is divided by another count."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    aggregation, normalizer = verl.normalizer_of(mode, mask, **counts)
    assert (aggregation, float(normalizer)) == wanted


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
def test_normalizers_without_their_counts_are_errors(mode: str) -> None:
    """Fails if one rank's count silently stands for that of all, or a name is not known."""
    with pytest.raises(ValueError, match=mode):
        verl.normalizer_of(mode, torch.ones(2, 3), dp_size=2 if mode != "sum" else 1)


class Update:
    """As vLLM's BatchUpdate."""

    def __init__(self, removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        self.removed, self.added, self.moved = removed, added, moved


class How:
    """As vLLM's MoveDirectionality."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_rows_follow_random_moves() -> None:
    """Fails if after any sequence of updates a request's state is at another row than it."""
    generator = torch.Generator().manual_seed(0)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    rows: vllm.Rows[str] = vllm.Rows(lambda params, output: params)
    truth: dict[int, str] = {}
    for step in range(300):
        kind = pick(5)
        a, b = pick(6), pick(6)
        if kind == 0:
            rows.update(Update(removed=[a]))
            truth.pop(a, None)
        elif kind == 1:
            rows.update(Update(added=[(a, f"request {step}", [], [])]))
            truth[a] = f"request {step}"
        elif kind == 2:
            rows.update(Update(added=[(a, None, [], [])]))
            truth.pop(a, None)
        elif a != b:
            swap = kind == 3
            rows.update(Update(moved=[(a, b, How("SWAP" if swap else "UNIDIRECTIONAL"))]))
            first, second = truth.pop(a, None), truth.pop(b, None)
            if first is not None:
                truth[b] = first
            if swap and second is not None:
                truth[a] = second
        rows.update(None)
        assert rows.states == truth
