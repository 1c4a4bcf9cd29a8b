"""Local generation: what was recorded is what was sampled from the model that trains."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate
from r1v3.data.special_tokens import SPECIAL_TOKENS, TURN_END
from r1v3.engine.hf.decoder import DecodeCache, HFDecoder, prefill
from r1v3.engine.hf.engine import HFEngine, response_hidden
from r1v3.rollout import local
from r1v3.rollout.contract import Rollout, Sampling, TokenRules, decode_texts
from r1v3.rollout.local import generate
from tests import tiny

WORDS = tiny.tokenizer()
STOP = WORDS.convert_tokens_to_ids(TURN_END)
NEVER = tuple(WORDS.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS if t != TURN_END)
RULES = TokenRules.of(WORDS)
EXAMPLES = [
    tiny.an_example(0, tiles=1, words=6),
    tiny.an_example(1, tiles=0, words=1),
    tiny.an_example(2, tiles=2, words=3),
    tiny.an_example(3, tiles=1, words=2),
]


def a_model() -> InternVLForConditionalGeneration:
    """Random, but it ends a turn now and then, so that rows end at different steps."""
    net = tiny.model(3)
    tiny.sharpen(net, 5.0)
    batch = collate(EXAMPLES, 0, responses=[e.prompt_ids for e in EXAMPLES])
    with torch.no_grad():
        usual = response_hidden(net, batch)[batch.loss_mask].mean(0)
        net.lm_head.weight[STOP] += 3.5 * usual / usual.square().sum()
    return net


NET = a_model()


def rollout(
    examples: Sequence[Example] = EXAMPLES,
    *,
    group_size: int = 1,
    seed: int = 0,
    generator: torch.Generator | None = None,
    **sampling: object,
) -> Rollout:
    settings: dict[str, object] = {"max_tokens": 24, "banned": NEVER, **sampling}
    batch = collate(examples, 0, responses=[()] * len(examples))
    chosen = Sampling(**settings)  # type: ignore[arg-type]
    generator = generator or torch.Generator().manual_seed(seed)
    return generate(
        HFDecoder(NET),
        batch,
        sampling=chosen,
        rules=RULES,
        group_size=group_size,
        uniforms=torch.rand(len(examples) * group_size, chosen.max_tokens, generator=generator),
    )


def as_batch(found: Rollout, group_size: int) -> Batch:
    batch = collate(EXAMPLES, 0, responses=[()] * len(EXAMPLES) * group_size, group_size=group_size)
    return replace(batch, response_ids=found.response_ids, loss_mask=found.mask)


def rows(found: Rollout) -> list[list[int]]:
    pairs = zip(found.response_ids, found.mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | list[int]], None]]:
    """Makes every row write the given text (or token ids) instead of what it would sample."""

    def write(text: str | list[int]) -> None:
        ids = WORDS.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        monkeypatch.setattr(local, "sample_tokens", tiny.draws_of([*ids, STOP]))

    yield write


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_the_engine_that_trains(
    group_size: int, temperature: float
) -> None:
    """The ratio of the first update must be 1: cache, padding and compaction change nothing."""
    found = rollout(group_size=group_size, temperature=temperature, banned=())
    lengths = found.mask.sum(1)
    assert len(set(lengths.tolist())) > 1  # or nothing was compacted
    engine = HFEngine(
        NET, WORDS, modules={"vision": True, "connector": True, "llm": True},
        temperature=temperature,
    )  # fmt: skip
    with torch.no_grad():
        logprobs, entropy = engine.head(as_batch(found, group_size)).logprobs_and_entropy()
    assert (found.logprobs - logprobs).abs().max() < 1e-5
    assert (found.entropy - entropy).abs().max() < 1e-5


def test_banned_tokens_never_appear_and_take_no_probability() -> None:
    """Recorded log-probs are of the distribution that was sampled from, bans included."""
    free = rollout(group_size=8, banned=())
    banned = tuple(sorted({i for row in rows(free) for i in row} - {STOP}))[::2]
    found = rollout(group_size=8, banned=banned)
    assert not {i for row in rows(found) for i in row} & set(banned)
    prompt = collate(EXAMPLES, 0, responses=[(STOP,)] * 4)
    with torch.no_grad():
        hidden = prefill(
            NET, DecodeCache(999), prompt.prompt_ids, prompt.prompt_mask, prompt.pixel_values
        )
        logits = NET.lm_head(hidden[:, -1])
    logits[:, list(banned)] = -math.inf
    wanted = torch.log_softmax(logits, -1).repeat_interleave(8, 0)
    first = found.response_ids[:, :1]
    assert torch.allclose(found.logprobs[:, :1], wanted.gather(1, first), atol=1e-4)


def test_only_the_end_of_turn_is_sampled_among_the_special_tokens() -> None:
    """With a head that prefers image tokens above all."""
    weight = NET.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[list(NEVER)] *= 30
        sampled = {i for row in rows(rollout(group_size=4)) for i in row}
        wild = {i for row in rows(rollout(group_size=4, banned=())) for i in row}
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert wild & set(NEVER) and not sampled & set(NEVER)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Compaction, left padding and neighbors must not change what a row writes."""
    together = rows(rollout(group_size=2))
    generator = torch.Generator().manual_seed(0)
    alone = [row for e in EXAMPLES for row in rows(rollout([e], group_size=2, generator=generator))]
    assert alone == together
    assert len({len(row) for row in together}) > 2


def test_a_seed_gives_the_same_completions_and_another_seed_others() -> None:
    assert rows(rollout(seed=1)) == rows(rollout(seed=1)) != rows(rollout(seed=2))


def test_samples_of_one_prompt_differ() -> None:
    found = rows(rollout(EXAMPLES[:1], group_size=6))
    assert len({tuple(row) for row in found}) == 6


def test_rows_end_with_their_end_of_turn_and_nothing_is_recorded_after_it() -> None:
    found = rollout(group_size=8)
    assert found.finished.any() and not found.finished.all()
    for i, row in enumerate(rows(found)):
        assert (STOP in row) == bool(found.finished[i])
        assert STOP not in row[:-1]
        if not found.finished[i]:
            assert len(row) == 24
        rest = ~found.mask[i]
        assert (found.response_ids[i][rest] == 0).all()
        assert (found.logprobs[i][rest] == 0).all() and (found.entropy[i][rest] == 0).all()
        assert found.mask[i].long().diff().le(0).all()
    assert torch.equal(found.sampled, found.mask)
    assert found.mask.any(0).all()  # no column beyond the longest row


def test_a_completion_may_be_the_end_of_turn_alone(
    scripted: Callable[[str | list[int]], None],
) -> None:
    scripted("")
    found = rollout(banned=())
    assert rows(found) == [[STOP]] * 4 and found.finished.all()
    assert decode_texts(WORDS, found, STOP) == [""] * 4
    engine = HFEngine(NET, WORDS, modules={"connector": True})
    logprobs, _ = engine.head(as_batch(found, 1)).logprobs_and_entropy()
    assert torch.allclose(logprobs.detach(), found.logprobs, atol=1e-4)


def test_one_token_is_a_legal_length() -> None:
    found = rollout(max_tokens=1)
    assert found.response_ids.shape == (4, 1) and found.mask.all()


def test_greedy_is_transformers_greedy() -> None:
    batch = collate(EXAMPLES, 0, responses=[()] * 4)
    theirs = NET.generate(
        input_ids=batch.prompt_ids,
        attention_mask=batch.prompt_mask.long(),
        pixel_values=batch.pixel_values,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=STOP,
        pad_token_id=0,
    )[:, batch.prompt_ids.shape[1] :]
    ours = rollout(temperature=0.0, banned=())
    width = ours.response_ids.shape[1]
    assert torch.equal(ours.response_ids, theirs[:, :width])
    assert (theirs[:, width:] == 0).all()
    assert rows(rollout(temperature=0.0, banned=(), seed=9)) == rows(ours)


def test_greedy_records_the_models_own_distribution() -> None:
    found = rollout(temperature=0.0, banned=())
    engine = HFEngine(NET, WORDS, modules={"connector": True})
    with torch.no_grad():
        logprobs, entropy = engine.head(as_batch(found, 1)).logprobs_and_entropy()
    assert torch.allclose(found.logprobs, logprobs, atol=1e-4)
    assert torch.allclose(found.entropy, entropy, atol=1e-4)


def forced_ids() -> list[int]:
    return list(WORDS.encode("\n</think>\n\n", add_special_tokens=False))


@pytest.mark.parametrize("budget", [1, 4, 9])
def test_an_open_thought_is_closed_after_exactly_its_budget(budget: int) -> None:
    """The forced tokens are marked, and sampling goes on after them."""
    free = rollout(banned=(*NEVER, STOP))
    found = rollout(banned=(*NEVER, STOP), budget=budget)
    forced = forced_ids()
    for i, row in enumerate(rows(found)):
        assert row[:budget] == rows(free)[i][:budget]
        assert row[budget : budget + len(forced)] == forced
        assert len(row) == 24
        wanted = [not budget <= t < budget + len(forced) for t in range(24)]
        assert found.sampled[i].tolist() == wanted
    text = decode_texts(WORDS, found, STOP)[0]
    assert "\n</think>\n\n" in text


def test_forced_tokens_have_the_logprobs_that_the_model_gives_them() -> None:
    found = rollout(banned=(), budget=3)
    engine = HFEngine(NET, WORDS, modules={"connector": True})
    with torch.no_grad():
        logprobs, _ = engine.head(as_batch(found, 1)).logprobs_and_entropy()
    assert torch.allclose(found.logprobs, logprobs, atol=1e-4)
    assert (~found.sampled & found.mask).any()


@pytest.mark.parametrize("budget", [23, 22, 24 - 3])
def test_a_tag_that_would_not_fit_behind_the_budget_is_forced_earlier_and_whole(
    budget: int,
) -> None:
    """A tag that is cut in half closes nothing."""
    found = rollout(banned=(*NEVER, STOP), budget=budget)
    start = min(budget, 24 - len(forced_ids()))
    assert all(row[start : start + len(forced_ids())] == forced_ids() for row in rows(found))


def test_a_thought_that_is_opened_again_has_its_budget_too(
    scripted: Callable[[str | list[int]], None],
) -> None:
    """Closing once must not let a second thought run to the end."""
    again = WORDS.encode("<think>", add_special_tokens=False)
    filler = WORDS.encode(" 5", add_special_tokens=False)[0]
    forced = forced_ids()
    start = 2 + len(forced)
    scripted([filler] * start + again + [filler] * 30)
    found = rollout(budget=2)
    for row in rows(found):
        assert row[2:start] == forced
        assert row[start : start + len(again)] == again
        second = start + len(again) + 2
        if second + len(forced) <= 24:
            assert row[second : second + len(forced)] == forced
        assert decode_texts(WORDS, found, STOP)[0].count("</think>") == 1 + (
            second + len(forced) <= 24
        )


@pytest.mark.parametrize("budget", [2, 3, 5, 7])
def test_a_tag_that_the_model_is_writing_is_not_cut_by_the_budget(
    scripted: Callable[[str | list[int]], None], budget: int
) -> None:
    """`</thi` and then a forced tag would leave half a tag in the thought."""
    ids = [WORDS.encode(c, add_special_tokens=False)[0] for c in "</think>"]
    scripted([*ids, *ids[:1] * 30])
    found = rollout(budget=budget)
    assert found.sampled[found.mask].all()
    assert decode_texts(WORDS, found, STOP)[0].startswith("</think>")


def test_rows_that_ended_before_their_budget_are_left_alone() -> None:
    free, found = rollout(group_size=8), rollout(group_size=8, budget=6)
    short = [i for i, row in enumerate(rows(free)) if len(row) <= 6 and free.finished[i]]
    assert short
    for i in short:
        assert rows(found)[i] == rows(free)[i]
        assert torch.equal(found.sampled[i], found.mask[i])


@pytest.mark.parametrize(
    "thought",
    [
        "So 3.\n</think>\n\n",
        "So 3. </think>\n\n",
        "So 3.</think>",
        "So 3 </think>x",
        "</think>\n",
    ],
)
def test_a_thought_that_is_closed_already_is_not_closed_again(
    scripted: Callable[[str | list[int]], None], thought: str
) -> None:
    """Whichever tokens the closing tag is written with: its marks merge with their neighbors."""
    ids = WORDS.encode(thought, add_special_tokens=False)
    scripted(thought + " I see 34" + " 5" * 12)
    found = rollout(budget=len(ids))
    assert found.sampled[found.mask].all()
    assert all(text.count("</think>") == 1 for text in decode_texts(WORDS, found, STOP))


def test_a_tag_split_into_single_bytes_is_found(
    scripted: Callable[[str | list[int]], None],
) -> None:
    ids = [WORDS.encode(c, add_special_tokens=False)[0] for c in "</think>"]
    scripted([*ids, *ids[:1] * 5])
    found = rollout(budget=8)
    assert found.sampled[found.mask].all()


@pytest.mark.parametrize("thought", ["So </thin k> 3", "<think> So 3", "So < / think > 3"])
def test_what_only_looks_like_a_closing_tag_leaves_the_thought_open(
    scripted: Callable[[str | list[int]], None], thought: str
) -> None:
    ids = WORDS.encode(thought, add_special_tokens=False)
    scripted([*ids, *ids[:1] * 30])
    found = rollout(budget=len(ids))
    forced = found.response_ids[:, len(ids) : len(ids) + len(forced_ids())]
    assert (forced == torch.tensor(forced_ids())).all()


def test_texts_leave_out_the_end_of_turn_and_padding() -> None:
    found = rollout(group_size=2)
    for text, row in zip(decode_texts(WORDS, found, STOP), rows(found), strict=True):
        assert text == WORDS.decode([i for i in row if i != STOP])
        assert TURN_END not in text
