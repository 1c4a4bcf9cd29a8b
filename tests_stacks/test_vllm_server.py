"""A real `vllm serve` of the demo's model: sampling, the suite, and GRPO against it.

One server answers all tests, in the order of the file: the last one trains, and leaves the server
with other weights. The server and its client run in vLLM's environment, stages of r1v3 in its own.
"""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests_stacks.serving import MODEL, ROOT, r1v3
from tests_stacks.vllm_serving import assert_grpo_trained, grpo_settings, vllm_serving

pytest.importorskip("vllm")

from r1v3.config import Decoding  # noqa: E402
from r1v3.data.sample import Sample  # noqa: E402
from r1v3.data.schema import load_samples  # noqa: E402
from r1v3.evaluation.policy import load_policy, mode_sampling  # noqa: E402
from r1v3.model.internvl import load_model  # noqa: E402
from r1v3.rollout.contract import Rollout, Sampling, TokenRules  # noqa: E402
from r1v3.rollout.server_pool import ServerLimits  # noqa: E402
from r1v3.rollout.vllm_server import VLLMServers  # noqa: E402
from r1v3.rollout.weights import publish  # noqa: E402

ROWS, PROMPTS, N, TOKENS = 12, 4, 5, 32
BASE = ROOT / MODEL
POLICY = load_policy(BASE)
RULES = TokenRules.of(POLICY.tokenizer)
PROCESSORS = ("NoWait", "ThoughtBudget")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions of the demo, and the base model as a trainer publishes it."""
    made = tmp_path_factory.mktemp("vllm")
    write = r1v3("tests_stacks.digits", "write", made, str(ROWS))
    subprocess.run(write, cwd=ROOT, check=True)
    publish(made / "weights", BASE, load_model(BASE).named_parameters(), 0)
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The server's address."""
    classes = [f"r1v3.integrations.vllm:{name}" for name in PROCESSORS]
    settings = ("--served-model-name", "tiny", "--logits-processors", *classes)
    with vllm_serving(folder / "weights" / "current", folder / "server.log", *settings) as found:
        yield found


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    return load_samples(folder / "samples.parquet")[:PROMPTS]


def client(address: str) -> VLLMServers:
    limits = ServerLimits(timeout_seconds=120, patience_seconds=60)
    return VLLMServers([address], RULES, BASE, limits=limits)


def complete(
    sampler: Any, samples: list[Sample], sampling: Sampling, *, count: int, thinking: bool = True
) -> Rollout:
    requests = POLICY.requests(samples, thinking)
    generator = torch.Generator().manual_seed(3)
    return sampler.complete(requests, sampling, group_size=count, generator=generator)


def kept(rollout: Rollout) -> list[list[int]]:
    """The token ids of every row."""
    pairs = zip(rollout.response_ids, rollout.mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("thinking", [True, False], ids=["slow", "nothink"])
def test_n_answers_to_a_picture(address: str, samples: list[Sample], thinking: bool) -> None:
    """Fails if a request of the sampler is refused, answered for another prompt, or answered with
    equal answers for all of a group."""
    found = complete(client(address), samples, Sampling(1.0, TOKENS), count=N, thinking=thinking)
    rows = kept(found)
    assert len(rows) == PROMPTS * N and found.sampled[found.mask].all()
    assert all(len({tuple(row) for row in rows[p * N : (p + 1) * N]}) > 1 for p in range(PROMPTS))
    never = set(RULES.never)
    assert not any(never & set(row) for row in rows)
    # Log-probs of sampled tokens, not of one model's favorites: those of all rows differ.
    assert found.logprobs[found.mask].unique().numel() > 20


@pytest.mark.parametrize("budget", [0, 4, 9])
def test_a_thought_over_a_picture_is_closed(
    address: str, samples: list[Sample], budget: int
) -> None:
    """Fails if a thought goes on beyond its budget, or forced tokens count as sampled."""
    # The end of the turn is banned, so that every thought spends its budget.
    sampling = Sampling(1.0, TOKENS, (RULES.stop_id,), budget)
    found = complete(client(address), samples, sampling, count=N)
    forced, texts = list(RULES.closing.forced), RULES.closing.texts
    for row, sampled in zip(kept(found), found.sampled.tolist(), strict=True):
        place = budget
        while "</think>" not in "".join(texts[i] for i in row[:place]) and sampled[place]:
            place += 1
        if not sampled[place]:
            assert row[place : place + len(forced)] == forced
            assert place - budget <= 4  # a tag that is being written is not cut
    assert (~found.sampled & found.mask).any(1).sum() > PROMPTS * N // 2
    assert found.logprobs[~found.sampled].abs().max() == 0


def test_banned_words_are_not_sampled(address: str, samples: list[Sample]) -> None:
    """Fails if NoWait, as the sampler asks for it, lets a word through."""
    words = ["So", "row"]
    decoding = Decoding(temperature=1.0, max_tokens=TOKENS)
    sampling, thinking = mode_sampling(decoding, words, POLICY.tokenizer, "nowait")
    assert len(sampling.banned) > 1 and thinking
    banned = set(sampling.banned)
    asked = kept(complete(client(address), samples, sampling, count=N))
    free = kept(complete(client(address), samples, Sampling(1.0, TOKENS), count=N))
    assert not any(banned & set(row) for row in asked)
    assert any(banned & set(row) for row in free)


def largest_difference(model: Path, address: str, samples: list[Sample]) -> float:
    """Of the log-probs of greedy answers over pictures, with a budget, from those of a folder;
    infinite where the tokens differ."""
    sampling = Sampling(0.0, TOKENS, (), 6)
    local = complete(load_policy(model).sampler, samples, sampling, count=1)
    remote = complete(client(address), samples, sampling, count=1)
    if kept(local) != kept(remote):
        return float("inf")
    counted: Tensor = local.sampled & local.mask
    assert torch.equal(local.sampled, remote.sampled)
    return float((local.logprobs - remote.logprobs)[counted].abs().max())


def test_greedy_answers_are_those_of_local_decoding(address: str, samples: list[Sample]) -> None:
    """Fails if vLLM sees other pixels, another prompt or other weights than training does."""
    assert largest_difference(BASE, address, samples) < 1e-4


def post(address: str, **settings: Any) -> dict[str, Any]:
    """A completion of a text prompt, by the token ids that an ordinary client reads."""
    text = "<|im_start|>user\nWhich row?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    body = {
        **{"model": "tiny", "prompt": text, "n": 4, "max_tokens": 16, "seed": 1},
        **{"temperature": 1.0, "ignore_eos": True, "return_token_ids": True, **settings},
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


def test_processors_by_class_path_do_what_a_request_asks(address: str) -> None:
    """Fails if vLLM's engine does not load NoWait and ThoughtBudget, or a request that does not
    ask for them is changed."""
    word = POLICY.tokenizer.encode("So", add_special_tokens=False)[0]
    forced = list(RULES.closing.forced)
    # Raised to where it is nearly all that is sampled.
    pushed = {str(word): 12}

    def rows(**asked: Any) -> list[list[int]]:
        choices = post(address, logit_bias=pushed, **asked)["choices"]
        return [choice["token_ids"] for choice in choices]

    assert all(word in row for row in rows())
    assert not any(word in row for row in rows(vllm_xargs={"nowait": ["So"]}))
    assert all(row[5 : 5 + len(forced)] == forced for row in rows(vllm_xargs={"thought_budget": 5}))
    with pytest.raises(urllib.error.HTTPError) as refused:
        rows(vllm_xargs={"thought_budget": -1})
    assert refused.value.code == 400


def test_the_suite_scores_a_server_as_it_scores_locally(folder: Path, address: str) -> None:
    """Fails if a mode asks a server otherwise than local decoding, or its answers score else."""
    scores, answers = [], []
    for name, rollout in (
        ("local", []),
        ("served", ["rollout.engine=vllm-server", f"rollout.urls=[{address}]"]),
    ):
        run = folder / f"suite-{name}"
        settings = [
            *("name=tiny", f"run={run}", f"data={folder}", f"model={MODEL}", "samples=1"),
            *("benchmarks=[mmstar]", "allow_other_files=true", "threads=1", "budgets=[6]"),
            *("modes=[slow,nothink,nowait]", "decoding.temperature=0", *rollout),
        ]
        suite = r1v3("r1v3", "suite", "configs/suite/tiny.yaml", *settings)
        subprocess.run(suite, cwd=ROOT, check=True)
        results = run / "suite" / "tiny"
        scores.append(json.loads((results / "scores.json").read_text())["scores"]["mmstar"])
        lines = [file.read_text().splitlines() for file in sorted(results.glob("mmstar.*.jsonl"))]
        texts = [[json.loads(line).get("text") for line in each] for each in lines]
        answers.append([sorted(filter(None, each)) for each in texts])
    assert len(scores[0]) == 4 and all(len(each) == ROWS for each in answers[0])
    assert {mode: one["score"]["value"] for mode, one in scores[0].items()} == {
        mode: one["score"]["value"] for mode, one in scores[1].items()
    }
    assert answers[0] == answers[1]


def test_grpo_trains_against_the_server(
    folder: Path, address: str, samples: list[Sample], tmp_path: Path
) -> None:
    """Fails if the server keeps old weights after an update, or its log-probs leave those of the
    trainer in any step."""
    settings = [
        *grpo_settings(tmp_path / "run", folder / "samples.parquet"),
        *("rollout.engine=vllm-server", f"rollout.urls=[{address}]"),
        f"rollout.weights_folder={folder / 'weights'}",
    ]
    grpo = r1v3("r1v3", "grpo", "configs/demo/grpo.yaml", *settings)
    subprocess.run(grpo, cwd=ROOT, check=True, timeout=600)
    assert_grpo_trained(tmp_path / "run")
    # Old weights would stand out: they differ by far more than the gap.
    assert largest_difference(BASE, address, samples) > 1e-2
    assert largest_difference(folder / "weights" / "current", address, samples) < 1e-4
