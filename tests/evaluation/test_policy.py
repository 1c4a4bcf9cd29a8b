"""A policy answers samples: order, batching and grading."""

import pytest
import torch

from r1v3.data.encoding import encode_sample
from r1v3.data.sample import Sample
from r1v3.data.special_tokens import SPECIAL_TOKENS, TURN_END
from r1v3.data.tiles import ImageShape
from r1v3.evaluation.policy import Answers, Policy
from r1v3.rewards import accuracy_reward
from r1v3.rollout import local
from r1v3.rollout.contract import Sampling, TokenRules
from tests import tiny

QUESTIONS = tiny.some_questions(7)
SETTINGS = Sampling(1.0, 10)


@pytest.fixture(scope="module")
def policy() -> Policy:
    net = tiny.model(1)
    tiny.sharpen(net, 5.0)
    return tiny.policy(net)


def answered(policy: Policy, samples: list[Sample] = QUESTIONS, **kwargs: object) -> Answers:
    generator = torch.Generator().manual_seed(int(kwargs.pop("seed", 0)))  # type: ignore[call-overload]
    sampling = kwargs.pop("sampling", SETTINGS)
    return policy.answer(samples, sampling, generator=generator, **kwargs)  # type: ignore[arg-type]


def test_the_models_own_image_shape_is_used(policy: Policy) -> None:
    assert policy.shape == ImageShape(tiny.IMAGE_SIZE, 1, tiny.TOKENS_PER_TILE)


def test_answers_come_in_the_order_of_the_samples(policy: Policy) -> None:
    """Questions are batched by length; greedy answers tell whose they are."""
    greedy = Sampling(0.0, 10)
    together = answered(policy, sampling=greedy, repeats=2, batch_prompts=3)
    assert len(together.rollouts) == 7 and len(together.texts) == 14
    assert together.correct.shape == together.tokens.shape == (7, 2)
    for i, sample in enumerate(QUESTIONS):
        alone = answered(policy, [sample], sampling=greedy)
        assert together.texts[2 * i] == together.texts[2 * i + 1] == alone.texts[0]
        assert together.tokens[i].tolist() == [alone.tokens[0, 0]] * 2
        ids = together.rollouts[i].response_ids[together.rollouts[i].mask]
        assert len(ids) == together.tokens[i].sum()
    assert len(set(together.texts)) > 2


def test_the_batch_size_changes_no_answer(policy: Policy) -> None:
    """Every row has its own random numbers, in the order of the questions' lengths."""
    whole = answered(policy, repeats=2)
    for size in (1, 3):
        assert answered(policy, repeats=2, batch_prompts=size).texts == whole.texts


def test_a_sample_is_encoded_once_for_each_template(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if five modes encode the same pictures five times, or a template answers another's."""
    encoded = []

    def counted(*args: object, **kwargs: object) -> object:
        encoded.append(kwargs["thinking"])
        return encode_sample(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("r1v3.evaluation.policy.encode_sample", counted)
    samples = list(QUESTIONS)
    for thinking in (True, False, True, False):
        assert [r.thinking for r in policy.requests(samples, thinking)] == [thinking] * 7
    assert encoded == [True] * 7 + [False] * 7
    assert [r.sample for r in policy.requests(samples[:2], True)] == samples[:2]


def test_what_is_encoded_already_is_not_encoded_again(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the examples that were made to check the questions are made a second time."""
    examples = [encode_sample(s, policy.tokenizer, policy.shape, thinking=True) for s in QUESTIONS]
    wanted = policy.requests(list(QUESTIONS), True)
    samples = list(QUESTIONS)
    policy.remember(samples, examples)
    monkeypatch.delattr("r1v3.evaluation.policy.encode_sample")
    found = policy.requests(samples, True)
    assert all(one.example is example for one, example in zip(found, examples, strict=True))
    for one, other in zip(found, wanted, strict=True):
        assert one.example.prompt_ids == other.example.prompt_ids
        assert (one.thinking, one.pictures) == (other.thinking, other.pictures)


def test_a_seed_gives_the_same_answers(policy: Policy) -> None:
    assert answered(policy, seed=4).texts == answered(policy, seed=4).texts
    assert answered(policy, seed=4).texts != answered(policy, seed=5).texts


def test_samples_of_one_question_differ(policy: Policy) -> None:
    assert len(set(answered(policy, QUESTIONS[:1], repeats=5).texts)) == 5


def test_answers_are_graded_against_their_own_question(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every completion is made to box the first question's answer."""
    words = tiny.tokenizer()
    right = QUESTIONS[0].ground_truth
    ids = words.encode(f"So.\n</think>\n\n\\boxed{{{right}}}", add_special_tokens=False)
    script = [*ids, words.convert_tokens_to_ids(TURN_END)]
    monkeypatch.setattr(local, "sample_tokens", tiny.draws_of(script))
    found = answered(policy, repeats=2, sampling=Sampling(1.0, 40))
    wanted = [
        accuracy_reward(f"\\boxed{{{right}}}", s.ground_truth, options=s.options) for s in QUESTIONS
    ]
    assert wanted[0] == 1 and 0 in wanted
    assert found.correct.tolist() == [[w, w] for w in wanted]
    assert (found.tokens == len(ids) + 1).all()


@pytest.mark.parametrize("thinking", [True, False])
def test_the_template_follows_the_mode(
    policy: Policy, thinking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []
    complete = policy.sampler.complete
    monkeypatch.setattr(
        policy.sampler,
        "complete",
        lambda requests, *a, **k: prompts.extend(requests) or complete(requests, *a, **k),
    )
    answered(policy, QUESTIONS[:1], thinking=thinking)
    wanted = encode_sample(QUESTIONS[0], policy.tokenizer, policy.shape, thinking=thinking)
    assert prompts[0].example.prompt_ids == wanted.prompt_ids
    assert policy.tokenizer.decode(wanted.prompt_ids).endswith("<think>\n") is thinking


def test_special_tokens_are_never_sampled_and_further_bans_are_added(policy: Policy) -> None:
    special = set(policy.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))) - {policy.stop_id}
    assert set(TokenRules.of(policy.tokenizer).never) == special
    free = answered(policy, repeats=8)
    seen = {int(i) for r in free.rollouts for i in r.response_ids[r.mask]}
    banned = tuple(sorted(seen - {policy.stop_id}))
    found = answered(policy, repeats=8, sampling=Sampling(1.0, 10, banned))
    assert not seen & special
    again = {int(i) for r in found.rollouts for i in r.response_ids[r.mask]}
    assert again and not again & (special | set(banned))


def test_the_policy_uses_the_weights_as_they_are_now(policy: Policy) -> None:
    """Training changes the live model between two calls."""
    greedy = Sampling(0.0, 6)
    before = answered(policy, sampling=greedy).texts
    weight = policy.sampler.decoder.model.lm_head.weight  # type: ignore[attr-defined]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(kept.flip(0))
    after = answered(policy, sampling=greedy).texts
    with torch.no_grad():
        weight.copy_(kept)
    assert before != after
    assert answered(policy, sampling=greedy).texts == before


def test_grades_are_those_of_the_answers_and_stop_between_batches(policy: Policy) -> None:
    """Fails if validation grades other completions than an evaluation, or goes on when asked to
    stop."""
    answers = answered(policy, seed=3, repeats=2, batch_prompts=2)
    asked = iter([False, True, False])
    for stops in (False, True):
        found = policy.grade(
            QUESTIONS,
            SETTINGS,
            generator=torch.Generator().manual_seed(3),
            repeats=2,
            batch_prompts=2,
            stopping=lambda stops=stops: stops and next(asked),  # type: ignore[misc]
        )
        if stops:
            assert found is None and next(asked) is False
        else:
            assert found is not None
            assert (found[0] == answers.correct).all() and (found[1] == answers.tokens).all()
