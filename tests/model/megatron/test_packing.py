"""A pack holds every sequence of its batch exactly, and nothing else."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1v3.data.batch import Batch
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
