"""A pack holds every sequence of its batch exactly, and nothing else; so do its parts together."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1v3.data.batch import Batch
from r1v3.model.megatron.context import context_part
from r1v3.model.megatron.packing import Packed, pack, pack_prompts

IMAGE = 7


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Any batch: uneven prompts, any mask, responses that hold image tokens, also none at all."""
    prompts, g = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(1, 6), min_size=prompts, max_size=prompts))
    longest = max(lengths) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return Batch(
        prompt_ids=torch.randint(0, 9, (prompts, longest), generator=generator),
        prompt_mask=torch.arange(longest) >= longest - torch.tensor(lengths)[:, None],
        pixels=None,
        tiles=torch.zeros(prompts, dtype=torch.int64),
        response_ids=torch.randint(0, 9, (prompts * g, width), generator=generator),
        loss_mask=torch.rand(prompts * g, width, generator=generator) < density,
        group_size=g,
    )


def visible(packed: Packed) -> dict[int, Tensor]:
    """The rows that each row attends to, in order: the mask that the segments stand for."""
    seen: dict[int, Tensor] = {}
    queries, keys = packed.query_starts.tolist(), packed.key_starts.tolist()
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        for row in range(a, b):
            seen[row] = packed.key_index[c : d - (b - 1 - row)]
    return seen


def sequences(batch: Batch) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(prompt, response, row) of every sample."""
    for row, response in enumerate(batch.response_ids):
        prompt = row // batch.group_size
        yield batch.prompt_ids[prompt][batch.prompt_mask[prompt]], response, row


@settings(max_examples=150, deadline=None)
@given(batch=batches(), multiple_of=st.sampled_from([1, 2, 4]))
def test_a_pack_is_its_batch(batch: Batch, multiple_of: int) -> None:
    """Fails if a counted token is lost, doubled, or predicted from anything but its own past."""
    packed = pack(batch, image_token_id=IMAGE, multiple_of=multiple_of)
    seen = visible(packed)
    assert sorted(seen) == list(range(len(packed.input_ids)))
    assert len(packed.input_ids) % multiple_of == 0

    counted = batch.loss_mask.flatten().nonzero().flatten()
    assert torch.equal(packed.places, counted)
    assert torch.equal(packed.token_ids, batch.response_ids.flatten()[counted])
    assert packed.shape == batch.response_ids.shape
    rows = dict(zip(packed.places.tolist(), packed.hidden_rows.tolist(), strict=True))
    used: set[int] = set()
    for prompt, response, row in sequences(batch):
        for column in batch.loss_mask[row].nonzero().flatten().tolist():
            past = seen[rows[row * response.numel() + column]]
            expected = torch.cat([prompt, response[:column]])
            assert torch.equal(packed.input_ids[past], expected)
            assert torch.equal(packed.position_ids[past], torch.arange(len(past)))
            # A row sees itself last, and every row of its past sees a prefix of that past.
            for index, earlier in enumerate(past.tolist()):
                assert torch.equal(seen[earlier], past[: index + 1])
            used |= set(past.tolist())
    unpadded = len(pack(batch, image_token_id=IMAGE).input_ids)
    prompts = set(range(int(batch.prompt_mask.sum())))
    assert used | prompts == set(range(unpadded))


@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_images_and_bookkeeping(batch: Batch) -> None:
    """Fails if a sampled image token becomes an image, or a length is not what the rows say."""
    packed = pack(batch, image_token_id=IMAGE, multiple_of=4)
    prompts = batch.prompt_ids[batch.prompt_mask]
    slots = packed.image_slots.nonzero().flatten()
    assert torch.equal(slots, (prompts == IMAGE).nonzero().flatten())
    assert packed.image_tokens == len(slots)
    assert packed.longest == int(packed.position_ids.amax()) + 1
    lengths = torch.tensor(packed.segments)
    assert torch.equal(lengths[:, 0].cumsum(0), packed.query_starts[1:].long())
    assert torch.equal(lengths[:, 1].cumsum(0), packed.key_starts[1:].long())
    assert torch.equal(packed.prompt_starts.diff(), batch.prompt_mask.sum(1))
    alone = pack_prompts(batch.prompt_ids, batch.prompt_mask, None, image_token_id=IMAGE)
    assert torch.equal(alone.input_ids, prompts)
    assert torch.equal(alone.prompt_starts, packed.prompt_starts)


def test_a_shared_prompt_stands_once() -> None:
    """Fails if packing gives up what it is for: one prompt of 3 tokens, 2 samples of 2 inputs."""
    batch = Batch(
        prompt_ids=torch.tensor([[0, 1, 2, 3]]),
        prompt_mask=torch.tensor([[False, True, True, True]]),
        pixels=None,
        tiles=torch.tensor([0]),
        response_ids=torch.tensor([[4, 5, 6, 8], [4, 6, 5, 8]]),
        loss_mask=torch.tensor([[True, True, True, False]] * 2),
        group_size=2,
    )
    packed = pack(batch, image_token_id=IMAGE)
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5, 4, 6]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert packed.query_starts.tolist() == [0, 3, 5, 7]
    assert packed.key_starts.tolist() == [0, 3, 8, 13]
    assert packed.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6]
    assert packed.hidden_rows.tolist() == [2, 3, 4, 2, 5, 6]


def test_an_empty_prompt_is_refused() -> None:
    """Fails if a first token would be predicted from nothing."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    with pytest.raises(ValueError, match=r"prompts \[1\] have no token"):
        pack_prompts(ids, mask, None, image_token_id=IMAGE)
    with pytest.raises(ValueError, match="no prompt"):
        pack_prompts(ids[:0], mask[:0], None, image_token_id=IMAGE)


@settings(max_examples=30, deadline=None)
@given(
    batch=batches(),
    ranks=st.sampled_from([2, 3, 4]),
    multiple_of=st.sampled_from([1, 4]),
    tiles=st.integers(0, 5),
)
def test_context_parts_are_their_pack(
    batch: Batch, ranks: int, multiple_of: int, tiles: int
) -> None:
    """Fails if a row, label, tile or image slot is lost or doubled between context-parallel ranks,
    or a row attends to anything but its own past; sequences may be shorter than a chunk a rank."""
    whole = pack(batch, image_token_id=IMAGE)
    # Every row is known by its token, which is 0 in padding.
    names = torch.arange(1, len(whole.input_ids) + 1)
    pixels = torch.rand(tiles, 3, 2, 2) if tiles else None
    whole = replace(whole, input_ids=names, pixel_values=pixels)
    parts = [context_part(whole, rank, ranks, multiple_of=multiple_of) for rank in range(ranks)]
    rows = torch.cat([part.input_ids for part in parts])
    assert len({len(part.input_ids) for part in parts}) == 1 and len(rows) % multiple_of == 0
    assert torch.equal(rows[rows > 0].sort().values, names)
    filled = [int((part.input_ids > 0).sum()) for part in parts]
    assert max(filled) - min(filled) <= 2

    seen, features = visible(whole), whole.image_slots.cumsum(0)
    for part in parts:
        for row, keys in visible(part).items():
            if name := int(part.input_ids[row]):
                assert torch.equal(rows[keys], seen[name - 1] + 1)
                assert part.position_ids[row] == whole.position_ids[name - 1]
        in_slots = part.input_ids[part.image_slots]
        assert torch.equal(features[in_slots - 1], part.feature_index + 1)
        assert (part.tiles, part.image_tokens) == (tiles, whole.image_tokens)
    labels = torch.cat([part.places for part in parts]).argsort()
    for name in ("places", "token_ids"):
        joined = torch.cat([getattr(part, name) for part in parts])[labels]
        assert torch.equal(joined, getattr(whole, name))
    predictors = torch.cat([part.input_ids[part.hidden_rows] for part in parts])[labels]
    assert torch.equal(predictors, whole.hidden_rows + 1)
    if pixels is not None:
        shares = [part.pixel_values for part in parts if part.pixel_values is not None]
        assert len({len(share) for share in shares}) == 1
        assert torch.equal(torch.cat(shares)[:tiles], pixels)


def test_context_parts_have_the_same_work() -> None:
    """Fails if the rank with the end of every sequence makes the others wait."""
    batch = Batch(
        prompt_ids=torch.ones(1, 100, dtype=torch.int64),
        prompt_mask=torch.ones(1, 100, dtype=torch.bool),
        pixels=None,
        tiles=torch.zeros(1, dtype=torch.int64),
        response_ids=torch.ones(3, 1001, dtype=torch.int64),
        loss_mask=torch.arange(1001) < torch.tensor([[1001], [400], [7]]),
        group_size=3,
    )
    whole = pack(batch, image_token_id=IMAGE)
    attended = [sum(map(len, visible(context_part(whole, rank, 4)).values())) for rank in range(4)]
    assert max(attended) < 1.02 * min(attended)
