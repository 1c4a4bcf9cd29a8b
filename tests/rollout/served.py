"""Prompts, a client with short times, and what its completions must be."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from r1v3.data.encoding import encode_sample
from r1v3.data.sample import Sample, make_sample
from r1v3.rollout.contract import Request, Rollout, Sampler, Sampling
from r1v3.rollout.server_pool import ServerLimits
from r1v3.rollout.vllm_server import VLLMServers
from tests import tiny
from tests.rollout.speaking_server import RULES, SpeakingServer, local

G = 3
SAMPLING = Sampling(1.0, 8)
TINY = Path(__file__).parents[2] / "assets" / "tiny-internvl"
NET = tiny.model(3)
tiny.sharpen(NET, 5.0)


def request(sample: Sample, thinking: bool = True) -> Request:
    example = encode_sample(sample, tiny.tokenizer(), tiny.SHAPE, thinking=thinking)
    return Request(example, sample, thinking)


def a_text(index: int) -> Sample:
    question = f"{index}+{index + 1}?"
    return make_sample(question=question, ground_truth="", data_source="t", index=index)


TEXTS = [request(a_text(i)) for i in range(6)]
PICTURES = [request(sample) for sample in tiny.some_questions(3)]


def client(servers: list[SpeakingServer], **options: Any) -> VLLMServers:
    limits = {"timeout_seconds": 20.0, "patience_seconds": 5.0, "pause_seconds": 0.05}
    names = {field.name for field in fields(ServerLimits)}
    limits |= {name: options.pop(name) for name in names & options.keys()}
    folder = options.pop("model_folder", TINY)
    urls = [server.url for server in servers]
    return VLLMServers(urls, RULES, folder, limits=ServerLimits(**limits), **options)


def complete(
    sampler: Sampler, requests: list[Request], sampling: Sampling = SAMPLING, g: int = G
) -> Rollout:
    generator = torch.Generator().manual_seed(5)
    return sampler.complete(requests, sampling, group_size=g, generator=generator)


def expect(
    found: Rollout,
    requests: list[Request],
    sampling: Sampling = SAMPLING,
    g: int = G,
    net: Any = NET,
) -> None:
    """The rows are those of local generation under the requests' own seeds, group by group."""
    generator = torch.Generator().manual_seed(5)
    seeds = torch.randint(0, 2**48, (len(requests),), generator=generator).tolist()
    assert found.response_ids.shape[0] == len(requests) * g
    for p, (asked, seed) in enumerate(zip(requests, seeds, strict=True)):
        true = local(net, asked.example, sampling, g if sampling.temperature else 1, seed)
        for i in range(g):
            row, other = p * g + i, i if sampling.temperature else 0
            ids = found.response_ids[row][found.mask[row]]
            assert torch.equal(ids, true.response_ids[other][true.mask[other]])
            values = found.logprobs[row][found.mask[row]]
            torch.testing.assert_close(
                values, true.logprobs[other][true.mask[other]], atol=1e-5, rtol=0
            )
            assert found.finished[row] == true.finished[other]
    assert found.sampled.equal(found.mask)
    assert found.entropy[found.mask].isnan().all() and (found.entropy[~found.mask] == 0).all()
