"""Sequences of flat tokens, for Triton kernels whose programs have a piece of one."""
# mypy: allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl

MASK_BLOCK = 4096
# Sequences that may be longer than a piece are cut, as long as there are fewer programs than two
# per multiprocessor.
PIECE = 4096
ENOUGH_PROGRAMS = 256


@triton.jit
def sequence_range(offsets_ptr, sequence, length, tokens, HAS_OFFSETS: tl.constexpr):
    """Where a sequence begins and ends."""
    begin = sequence * length
    end = tl.minimum(begin + length, tokens)
    if HAS_OFFSETS:
        begin = tl.load(offsets_ptr + sequence)
        end = tl.load(offsets_ptr + sequence + 1)
    return begin, end


@triton.jit
def valid_tokens(mask_ptr, begin, end, BLOCK: tl.constexpr):
    """Valid tokens in [begin, end)."""
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        t = start + lanes
        counts += (tl.load(mask_ptr + t, mask=t < end, other=0) != 0).to(tl.int32)
    return tl.sum(counts, axis=0).to(tl.float32)


def parts_of_sequences(tokens: int, sequences: int) -> int:
    """Programs for each sequence of a batch."""
    most = ENOUGH_PROGRAMS // max(sequences, 1)
    return max(1, min(int(triton.cdiv(tokens, PIECE)), most))
