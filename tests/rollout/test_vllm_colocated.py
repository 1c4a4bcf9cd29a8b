"""vLLM in the training processes, with a stand-in for `vllm.LLM` that a tiny model answers for.

The stand-in takes the arguments that vLLM documents and refuses any other; it shows what this
side asks for and makes of the answers, not that vLLM does as documented.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from r1v3.config import RolloutEngine
from r1v3.data.encoding import Example, encode_sample
from r1v3.data.images import tile_image
from r1v3.data.sample import make_sample
from r1v3.data.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from r1v3.data.tokenizer import token_id
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.conversion import Checkpoint, convert, weights
from r1v3.model.internvl import load_model
from r1v3.ranks import Ranks
from r1v3.rollout.contract import Request, Rollout, Sampling, TokenRules
from r1v3.rollout.vllm_colocated import OWN_ARGUMENTS, ColocatedVLLM, collapse_pictures
from tests import tiny
from tests.rollout.speaking_server import local

WORDS = tiny.tokenizer()
RULES = TokenRules.of(WORDS)
START, CONTEXT, END = (token_id(WORDS, t) for t in (IMAGE_START, IMAGE_CONTEXT, IMAGE_END))


class SamplingParams:
    def __init__(
        self,
        *,
        n: int,
        seed: int,
        temperature: float,
        max_tokens: int,
        top_p: float,
        top_k: int,
        min_p: float,
        logprobs: int,
        ignore_eos: bool,
        stop_token_ids: list[int],
        logit_bias: dict[int, float],
        detokenize: bool,
    ) -> None:
        assert n == 1 or temperature > 0, "n must be 1 when using greedy sampling"
        assert (top_p, top_k, min_p, ignore_eos) == (1.0, 0, 0.0, True)
        assert stop_token_ids == [RULES.stop_id] and set(logit_bias.values()) == {-100.0}
        self.n, self.seed, self.banned = n, seed, tuple(logit_bias)
        self.temperature, self.max_tokens = temperature, max_tokens


class Platform:
    """The part of vLLM that knows the machine."""

    sleeps = True

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        return cls.sleeps


class LLM:
    """Answers from its own copy of the model; memory that is not there makes it fail."""

    def __init__(
        self,
        *,
        model: str,
        distributed_executor_backend: str,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        max_model_len: int,
        dtype: str,
        seed: int,
        enable_sleep_mode: bool,
        logprobs_mode: str,
        generation_config: str,
        trust_remote_code: bool = False,
        max_num_seqs: int = 0,
        load_format: str = "auto",
    ) -> None:
        self.max_num_seqs, self.load_format = max_num_seqs, load_format
        assert distributed_executor_backend == "external_launcher"
        assert enable_sleep_mode == Platform.sleeps
        assert logprobs_mode == "processed_logprobs" and generation_config == "vllm"
        self.net = load_model(Path(model)).eval()
        self.original = trust_remote_code
        text = "<image>" if trust_remote_code else IMAGE_CONTEXT
        self.placeholder = WORDS.encode(text, add_special_tokens=False)
        self.resident = {"weights", "kv_cache"}
        self.calls: list[str] = []
        # Outputs of the vision tower: what the scheduler believes to be there, and what is.
        self.believed: set[str] = set()
        self.encoded: set[str] = set()
        self.llm_engine = SimpleNamespace(reset_encoder_cache=self.believed.clear)
        self.uuids: list[str] = []
        self.names: list[str] = []
        self.prompt_hook: Callable[[list[int]], list[int]] = lambda ids: ids

    def generate(
        self, prompts: list[dict[str, Any]], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[Any]:
        assert self.resident == {"weights", "kv_cache"}
        return [self._one(prompt, p) for prompt, p in zip(prompts, params, strict=True)]

    def _one(self, prompt: dict[str, Any], params: SamplingParams) -> Any:
        images = iter(prompt.get("multi_modal_data", {}).get("image", ()))
        names = set(prompt.get("multi_modal_uuids", {}).get("image", ()))
        assert names & self.believed <= self.encoded, "Encoder cache miss"
        self.believed |= names
        self.encoded |= names
        self.uuids += names
        ids: list[int] = []
        size = tiny.IMAGE_SIZE
        tiles: list[np.ndarray] = []
        left = list(prompt["prompt_token_ids"])
        while left:
            if left[: len(self.placeholder)] != self.placeholder:
                ids.append(left.pop(0))
                continue
            del left[: len(self.placeholder)]
            image = next(images)
            assert isinstance(image, Image.Image) and image.mode == "RGB"
            cut = [np.asarray(t) for t in tile_image(image, tile_size=size, max_tiles=1)]
            ids += [START, *[CONTEXT] * len(cut) * tiny.TOKENS_PER_TILE, END]
            tiles += cut
        assert next(images, None) is None
        stacked = np.stack(tiles) if tiles else np.zeros((0, size, size, 3), dtype=np.uint8)
        example = Example(tuple(ids), stacked)
        sampling = Sampling(params.temperature, params.max_tokens, params.banned)
        found = local(self.net, example, sampling, params.n, params.seed)
        outputs = []
        for i in range(params.n):
            tokens = found.response_ids[i][found.mask[i]].tolist()
            values = found.logprobs[i][found.mask[i]].tolist()
            outputs.append(
                SimpleNamespace(
                    index=i,
                    token_ids=tokens,
                    logprobs=[
                        {t: SimpleNamespace(logprob=v)} for t, v in zip(tokens, values, strict=True)
                    ],
                    finish_reason="stop" if found.finished[i] else "length",
                )
            )
        return SimpleNamespace(prompt_token_ids=self.prompt_hook(ids), outputs=outputs)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[Any]:
        assert method == "reload_weights" and "weights" in self.resident
        own = dict(self.net.named_parameters())
        if self.original:
            own = {
                weight.original[0]: own[weight.native[0]]
                for weight in weights(self.net.config)
                if len(weight.native) == 1
            }
        self.calls.append(method)
        self.encoded.clear()
        with torch.no_grad():
            for name, tensor in kwargs["weights_iterator"]:
                if not self.original or name in own:
                    own[name].copy_(tensor)
                self.names.append(name)
        return [None]

    def sleep(self, *, level: int) -> None:
        assert Platform.sleeps
        self.calls.append(f"sleep {level}")
        self.resident = set()
        if level == 2:
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {tags}")
        self.resident |= set(tags or ("weights", "kv_cache"))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = Platform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


def requests() -> list[Request]:
    text = make_sample(question="3+4?", ground_truth="7", data_source="t", index=0)
    samples = [*tiny.some_questions(2), text]
    return [Request(encode_sample(s, WORDS, tiny.SHAPE), s) for s in samples]


def complete(sampler: ColocatedVLLM, sampling: Sampling, g: int = 2) -> Rollout:
    generator = torch.Generator().manual_seed(3)
    return sampler.complete(requests(), sampling, group_size=g, generator=generator)


def test_completions_are_those_of_the_weights_that_were_handed_over(
    stand_in: None, folder: Path
) -> None:
    """Sleep, update tensor by tensor, wake, complete: tokens and log-probs of the new weights."""
    sampler = ColocatedVLLM(folder, WORDS, max_length=400)
    new = tiny.model(7)
    llm = sampler._llm

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for count, weight in enumerate(HFEngine(new, WORDS, modules={}).export_hf()):
            assert len(llm.names) == count
            yield weight

    sampler.sleep()
    sampler.update_weights(one_by_one(), 4)
    sampler.wake()
    assert llm.calls == ["sleep 2", "wake ['weights']", "reload_weights", "wake ['kv_cache']"]
    assert len(set(llm.names)) == len(llm.names) == len(list(new.parameters()))
    sampling = Sampling(0.8, 6, (50, 51))
    found = complete(sampler, sampling)
    seeds = torch.randint(0, 2**48, (3, 3), generator=torch.Generator().manual_seed(3))
    banned = Sampling(0.8, 6, (*RULES.never, 50, 51))
    for p, request in enumerate(requests()):
        true = local(new, request.example, banned, 2, int(seeds[p, 0]))
        for i in range(2):
            row = 2 * p + i
            assert torch.equal(
                found.response_ids[row][found.mask[row]], true.response_ids[i][true.mask[i]]
            )
            torch.testing.assert_close(
                found.logprobs[row][found.mask[row]], true.logprobs[i][true.mask[i]]
            )
    assert found.entropy[found.mask].isnan().all()
    assert {uuid.rpartition("-")[2] for uuid in llm.uuids} == {"4"} and len(set(llm.uuids)) == 2


def test_further_arguments_reach_vllm(stand_in: None, folder: Path) -> None:
    """Fails if a setting is lost, or one that sampling relies on can be changed."""
    given = {"max_num_seqs": 7, "load_format": "dummy"}
    sampler = ColocatedVLLM(folder, WORDS, max_length=400, arguments=given)
    assert (sampler._llm.max_num_seqs, sampler._llm.load_format) == (7, "dummy")
    for name in OWN_ARGUMENTS:
        with pytest.raises(ValueError, match=f"vLLM's {name} cannot be given"):
            ColocatedVLLM(folder, WORDS, max_length=400, arguments={name: 1})
    with pytest.raises(ValueError, match="`vllm` holds arguments of engine vllm"):
        RolloutEngine(engine="local", vllm=given)


def test_nothing_is_completed_by_random_weights(stand_in: None, folder: Path) -> None:
    """Fails if an evaluation with load_format dummy would score noise."""
    dummy = {"load_format": "dummy"}
    sampler = ColocatedVLLM(folder, WORDS, max_length=400, arguments=dummy)
    with pytest.raises(RuntimeError, match="load_format dummy"):
        complete(sampler, Sampling(1.0, 4))
    sampler.update_weights(HFEngine(tiny.model(7), WORDS, modules={}).export_hf(), 0)
    assert complete(sampler, Sampling(1.0, 4)).mask.any()


def test_a_spent_thought_over_a_picture_is_closed_and_goes_on(stand_in: None, folder: Path) -> None:
    sampler = ColocatedVLLM(folder, WORDS, max_length=400)
    found = complete(sampler, Sampling(1.0, 16, (RULES.stop_id,), 3))
    forced = RULES.closing.forced
    tag = slice(3, 3 + len(forced))
    assert found.mask.all() and found.response_ids.shape == (6, 16)
    assert (found.response_ids[:, tag] == torch.tensor(forced)).all()
    assert (~found.sampled[:, tag]).all() and found.sampled[:, tag.stop :].all()
    greedy = complete(sampler, Sampling(0.0, 5))
    assert torch.equal(greedy.response_ids[::2], greedy.response_ids[1::2])


def test_a_folder_in_the_original_layout_is_given_its_names_and_placeholder(
    stand_in: None, folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "original"
    convert(folder, base, "original")
    sampler = ColocatedVLLM(base, WORDS, max_length=400, arguments={"trust_remote_code": True})
    complete(sampler, Sampling(1.0, 4))
    net = tiny.model(0)
    sampler.update_weights(HFEngine(net, WORDS, modules={}).export_hf(), 1)
    assert set(sampler._llm.names) == set(Checkpoint(base))


def test_calls_out_of_order_are_refused(stand_in: None, folder: Path) -> None:
    """Fails if completions could come from weights that are not there."""
    sampler = ColocatedVLLM(folder, WORDS, max_length=400)
    sampler.sleep()
    sampler.sleep()
    with pytest.raises(RuntimeError, match="update_weights comes before wake"):
        sampler.wake()
    with pytest.raises(RuntimeError, match="asleep"):
        complete(sampler, Sampling(1.0, 4))
    gentle = ColocatedVLLM(folder, WORDS, max_length=400, sleep_level=1)
    gentle.sleep()
    gentle.wake()
    assert gentle._llm.calls == ["sleep 1", "wake None"]
    complete(gentle, Sampling(1.0, 2))


def test_weights_may_come_twice_for_a_step(stand_in: None, folder: Path) -> None:
    """Fails if vLLM goes on believing in outputs of the vision tower that an update has dropped,
    which ends the engine with "Encoder cache miss"."""
    sampler = ColocatedVLLM(folder, WORDS, max_length=400)
    for seed in (7, 8):
        sampler.update_weights(HFEngine(tiny.model(seed), WORDS, modules={}).export_hf(), 3)
        complete(sampler, Sampling(1.0, 2))


def test_without_a_sleep_mode_it_stays_awake(
    stand_in: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if vLLM is asked for a sleep mode where it refuses one, as on a CPU, or if the cache
    of old weights outlives them there."""
    monkeypatch.setattr(Platform, "sleeps", False)
    sampler = ColocatedVLLM(folder, WORDS, max_length=400)
    sampler.sleep()
    sampler.update_weights(HFEngine(tiny.model(7), WORDS, modules={}).export_hf(), 1)
    sampler.wake()
    assert sampler._llm.calls == ["reload_weights", "reset"]
    complete(sampler, Sampling(1.0, 2))


def test_another_prompt_than_the_trainers_is_an_error(stand_in: None, folder: Path) -> None:
    sampler = ColocatedVLLM(folder, WORDS, max_length=400)
    sampler._llm.prompt_hook = lambda ids: ids[:-1]
    with pytest.raises(ValueError, match="vLLM completed another prompt"):
        complete(sampler, Sampling(1.0, 4))


def test_copies_share_the_prompts(stand_in: None, folder: Path) -> None:
    """Two copies of two ranks: every prompt belongs to exactly one copy."""

    class Four(Ranks):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.size = rank, 4

        def gather(self, value: Any) -> list[Any]:
            return [value if rank == self.rank else ([], None) for rank in range(4)]

    whole = complete(ColocatedVLLM(folder, WORDS, max_length=400), Sampling(1.0, 4))
    parts = []
    for rank in (0, 2):
        sampler = ColocatedVLLM(folder, WORDS, max_length=400, ranks=Four(rank), tensor=2)
        parts.append(complete(sampler, Sampling(1.0, 4)).response_ids)
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(torch.cat(parts), whole.response_ids)


def test_pictures_collapse_to_their_placeholders() -> None:
    ids = [5, START, CONTEXT, CONTEXT, END, 6, START, CONTEXT, END, START, 7, CONTEXT, START]
    wanted = [5, 8, 9, 6, 8, 9, START, 7, CONTEXT, START]
    assert collapse_pictures(ids, (START, CONTEXT, END), [8, 9]) == (wanted, 2)


def test_without_vllm_the_error_says_how_to_get_it(folder: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install 'r1v3\[vllm\]'"):
        ColocatedVLLM(folder, WORDS, max_length=400)


def test_bad_settings_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="tensor 2 does not divide the 1 processes"):
        ColocatedVLLM(folder, WORDS, max_length=400, tensor=2)
    with pytest.raises(ValueError, match="memory_share 0.0 must be above 0"):
        ColocatedVLLM(folder, WORDS, max_length=400, memory_share=0.0)
