"""Answers of the endpoint beside those of local sampling and of the engine that trains."""

import threading
from typing import Any

import pytest
import torch

from r1v3.config import Decoding
from r1v3.data.encoding import collate
from r1v3.data.sample import make_sample
from r1v3.data.tokenizer import load_tokenizer
from r1v3.engine.hf.engine import HFEngine
from r1v3.evaluation.policy import Policy, load_policy, mode_sampling
from r1v3.model.internvl import load_model
from r1v3.rollout.contract import Rollout
from tests.serve.serving import MODEL, PICTURE, QUESTION, Served, user


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(MODEL)


def generated(policy: Policy, mode: str, temperature: float, tokens: int, seed: int) -> Rollout:
    """Completions as `r1v3 generate` makes them."""
    sample = make_sample(
        question=QUESTION, ground_truth="", data_source="r1v3/own", index=0, images=[PICTURE]
    )
    decoding = Decoding(temperature=temperature, max_tokens=tokens)
    words = ("Wait", "Alternatively", "Hmm")
    sampling, thinking = mode_sampling(decoding, words, policy.tokenizer, mode)
    requests = policy.requests([sample], thinking)
    generator = torch.Generator().manual_seed(seed)
    return policy.sampler.complete(requests, sampling, generator=generator)


def ids_of(answer: dict[str, Any], index: int = 0) -> list[int]:
    found: list[int] = answer["choices"][index]["token_ids"]
    return found


@pytest.mark.parametrize("mode", ["slow", "nothink", "nowait", "budget-9"])
@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (1.0, 7)])
def test_tokens_are_those_of_r1v3_generate(
    served: Served, policy: Policy, mode: str, temperature: float, seed: int
) -> None:
    """Fails if the served model answers otherwise than the same model asked on the command line:
    another prompt, other bans, other random numbers, a thought closed elsewhere."""
    wanted = generated(policy, mode, temperature, 40, seed)
    answer = served.chat(
        model=f"tiny-internvl-{mode}", temperature=temperature, seed=seed, max_tokens=40,
        return_token_ids=True, logprobs=True,
    )  # fmt: skip
    assert ids_of(answer) == wanted.response_ids[0, wanted.mask[0]].tolist()
    finish = "stop" if wanted.finished[0] else "length"
    assert answer["choices"][0]["finish_reason"] == finish
    entries = answer["choices"][0]["logprobs"]["content"]
    for name, values in (("logprob", wanted.logprobs), ("entropy", wanted.entropy)):
        found = torch.tensor([max(entry[name], -9999.0) for entry in entries])
        assert torch.allclose(found, values[0, : len(found)].clamp(min=-9999), atol=1e-4), name


def test_logprobs_are_those_of_the_engine_that_trains(served: Served) -> None:
    """Fails if a client's log-probs are not those of the model: a wrong position, a wrong mask."""
    answer = served.chat(
        temperature=1, seed=3, max_tokens=32, n=4, logprobs=True, return_token_ids=True
    )
    tokenizer = load_tokenizer(MODEL)
    engine = HFEngine(load_model(MODEL), tokenizer, modules=None)
    sample = make_sample(
        question=QUESTION, ground_truth="", data_source="r1v3/own", index=0, images=[PICTURE]
    )
    policy = load_policy(MODEL)
    example = policy.requests([sample], True)[0].example
    assert list(example.prompt_ids) == answer["prompt_token_ids"]
    responses = [ids_of(answer, index) for index in range(4)]
    batch = collate([example], tokenizer.pad_token_id, responses=responses, group_size=4)
    ((logprobs, entropy),) = engine.evaluate([batch])
    logprobs, entropy = logprobs[batch.loss_mask], entropy[batch.loss_mask]
    entries = [e for choice in answer["choices"] for e in choice["logprobs"]["content"]]
    assert len(entries) == len(logprobs) > 40
    # The engine's are of all tokens; here special tokens are banned, which have next to nothing.
    assert torch.allclose(torch.tensor([e["logprob"] for e in entries]), logprobs, atol=1e-3)
    assert torch.allclose(torch.tensor([e["entropy"] for e in entries]), entropy, atol=1e-2)


def test_a_seed_decides_whatever_else_is_in_the_batch(served: Served) -> None:
    """Fails if a request's tokens depend on its neighbors: shared random numbers, keys of another
    row after rows have moved, one row's settings for all."""
    asked = [
        {"seed": 11, "temperature": 1.0, "max_tokens": 60},
        {"seed": 12, "temperature": 0.7, "max_tokens": 5, "top_p": 0.9, "n": 2},
        {"seed": 13, "temperature": 1.0, "max_tokens": 33, "mode": "nowait"},
        {"seed": 14, "temperature": 0.0, "max_tokens": 50, "mode": "nothink"},
        {"seed": 15, "temperature": 1.3, "max_tokens": 45, "top_k": 5, "thinking_budget": 6},
        {"seed": 16, "temperature": 1.0, "max_tokens": 21, "messages": [user("Why?")]},
        {"seed": 17, "temperature": 1.0, "max_tokens": 64, "min_p": 0.05},
        {"seed": 18, "temperature": 1.0, "max_tokens": 12, "logit_bias": {"40": 100}},
    ]
    alone = [served.chat(return_token_ids=True, **one) for one in asked]
    together: list[dict[str, Any]] = [{} for _ in asked]
    start = threading.Barrier(len(asked))

    def ask(number: int) -> None:
        start.wait()
        together[number] = served.chat(return_token_ids=True, **asked[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert [c["token_ids"] for c in one["choices"]] == [
            c["token_ids"] for c in other["choices"]
        ]
    assert served.endpoint.batcher.rows == []


def test_samples_of_one_request_are_those_of_its_seeds(served: Served) -> None:
    """Fails if n=3 answers otherwise than three requests: one prefill must serve all."""
    together = served.chat(temperature=1, seed=5, n=3, return_token_ids=True)
    apart = [served.chat(temperature=1, seed=5 + i, return_token_ids=True) for i in range(3)]
    assert [ids_of(together, i) for i in range(3)] == [ids_of(one) for one in apart]
    assert len({tuple(ids_of(one)) for one in apart}) > 1


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.6}, {"top_k": 3}, {"temperature": 0}])
def test_the_likeliest_tokens_are_reported(served: Served, truncation: dict[str, Any]) -> None:
    """Fails if the alternatives are of another distribution than the token, or in another order."""
    answer = served.chat(
        **{"temperature": 0.8, "seed": 1, "logprobs": True, "top_logprobs": 5, **truncation}
    )
    for entry in answer["choices"][0]["logprobs"]["content"]:
        values = [one["logprob"] for one in entry["top_logprobs"]]
        assert 1 <= len(values) <= (3 if "top_k" in truncation else 5)
        assert values == sorted(values, reverse=True)
        assert sum(torch.tensor(values).exp()) < 1 + 1e-4
        by_bytes = {tuple(one["bytes"]): one["logprob"] for one in entry["top_logprobs"]}
        if entry["logprob"] > values[-1]:
            assert by_bytes[tuple(entry["bytes"])] == pytest.approx(entry["logprob"], abs=1e-6)
        if truncation.get("temperature") == 0:
            assert values[0] == entry["logprob"]


def test_max_tokens_are_cut_to_the_context(served: Served) -> None:
    """Fails if the kits' usual 32,768 tokens are refused, allocated, or run past the positions."""
    ban_end = {"2": -100}  # the end of the turn
    long = [user("7 " * 200)]
    answer = served.chat(max_tokens=32768, logit_bias=ban_end, mode="nothink", n=2, messages=long)
    usage = answer["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] // 2 == 512
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
    both = served.chat(max_completion_tokens=3, max_tokens=9)
    assert both["usage"]["completion_tokens"] == 3
