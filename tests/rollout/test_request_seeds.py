"""Prompts with random numbers and a number of tiles of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1v3.config import Pictures, RolloutEngine, Suite
from r1v3.data.encoding import encode_sample
from r1v3.engine.hf.decoder import HFDecoder
from r1v3.ranks import ALONE
from r1v3.rollout.build import build_sampler
from r1v3.rollout.completions import Completion
from r1v3.rollout.contract import Request, Sampling, TokenRules
from r1v3.rollout.local import LocalSampler
from r1v3.rollout.server_pool import Server
from r1v3.rollout.vllm_protocol import Call, chat_call, picture_name
from r1v3.rollout.vllm_server import VLLMServers
from tests import tiny


def requests(count: int, seeds: list[int | None]) -> list[Request]:
    samples = tiny.some_questions(count)
    return [
        Request(encode_sample(sample, tiny.tokenizer(), tiny.SHAPE), sample, seed=seed)
        for sample, seed in zip(samples, seeds, strict=True)
    ]


def test_a_seeded_prompt_is_answered_alike_in_any_company() -> None:
    """Fails if a resumed evaluation answers otherwise than an uninterrupted one."""
    sampler = LocalSampler(HFDecoder(tiny.model()), TokenRules.of(tiny.tokenizer()))
    asked = requests(4, [11, 12, 13, None])
    settings = Sampling(1.0, 8)

    def ids(chosen: list[Request], seed: int, samples: int = 2) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        found = sampler.complete(chosen, settings, group_size=samples, generator=generator)
        pairs = zip(found.response_ids.tolist(), found.mask.tolist(), strict=True)
        return [[i for i, kept in zip(row, mask, strict=True) if kept] for row, mask in pairs]

    together = ids(asked, 1)
    assert ids(asked[2:3], 5) == together[4:6]
    assert ids([asked[1], asked[0]], 7) == together[2:4] + together[:2]
    assert ids(asked[:1], 3, samples=3)[:2] == together[:2]
    assert ids(asked[3:], 1) != together[6:]


def test_a_server_is_told_the_number_of_tiles() -> None:
    """Fails if vLLM cuts more tiles than the prompt has places for, or reuses those of another
    number of them."""
    (request,) = requests(1, [5])
    rules, data = TokenRules.of(tiny.tokenizer()), request.sample.images[0]
    own = Request(request.example, request.sample, max_tiles=2)
    for placeholder, name in (("<image>", "max_dynamic_patch"), ("<IMG_CONTEXT>", "max_patches")):
        plain, told = (
            chat_call(
                one, Sampling(), rules, count=1, max_tokens=4, seed=0, step=1,
                placeholder=placeholder,
            ).body
            for one in (request, own)
        )  # fmt: skip
        assert told["mm_processor_kwargs"] == {name: 2} and "mm_processor_kwargs" not in plain
    names = {picture_name(data, Pictures(), 1, tiles) for tiles in (None, 1, 2)}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("stage_tiles", "told"), [(None, None), (1, None), (3, {"max_patches": 3})]
)
def test_a_stages_own_number_of_tiles_reaches_the_server(
    stage_tiles: int | None, told: dict[str, int] | None, tmp_path: Path
) -> None:
    """Fails if a stage with more tiles than the model folder names is refused by every server:
    they would cut as the folder says, and complete other prompts than the trainer's."""
    folder = tiny.save(tmp_path / "model")
    stage = Suite(run=tmp_path, model=folder, max_tiles=stage_tiles)
    sampler = build_sampler(
        RolloutEngine(engine="vllm-server", urls=("http://127.0.0.1:1",)), stage, tiny.tokenizer(),
        ranks=ALONE, max_length=64, local=lambda: pytest.fail("no local decoder is wanted"),
    )  # fmt: skip
    assert isinstance(sampler, VLLMServers)
    (request,) = requests(1, [5])
    own = replace(request, max_tiles=2)
    asked = [sampler._call(one, Sampling(), 1, 0).body for one in (request, own)]
    assert [body.get("mm_processor_kwargs") for body in asked] == [told, {"max_patches": 2}]


def test_a_server_is_told_the_seed_of_a_seeded_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an answer from a server depends on what else was asked in the same call."""
    sampler = VLLMServers(
        ["http://127.0.0.1:1"], TokenRules.of(tiny.tokenizer()), tiny.save(tmp_path / "model")
    )
    told: list[int] = []

    async def answer(server: Server, call: Call) -> list[Completion]:
        told.append(call.body["seed"])
        return [Completion((5,), (0.0,), True)] * call.count

    async def check(server: Server) -> None:
        pass

    monkeypatch.setattr(sampler._pool, "ask", answer)
    monkeypatch.setattr(sampler._pool, "check", check)
    asked = requests(3, [11, None, 13])
    for seed in (1, 2):
        sampler.complete(asked, Sampling(1.0, 4), generator=torch.Generator().manual_seed(seed))
    assert told[0] == told[3] == 11 and told[2] == told[5] == 13 and told[1] != told[4]
