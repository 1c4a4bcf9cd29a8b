"""Entropy of critical reasoning tokens, by which checkpoints are selected.

Critical tokens open a new turn of thought ("Wait", "Alternatively", "Hmm"). The Skywork-R1V3
report (section 5, figure 5) selects the checkpoint that is most uncertain where it emits them:
a model that merely imitates reasoning emits them with almost no entropy. Definitions used here,
with H_t in nats the entropy of the distribution from which token y_t was drawn:

    critical_entropy        mean of H_t over tokens y_t that are critical
    critical_entropy_after  mean of H_s, s the next counted token after such a t
    entropy                 mean of H_t over all counted tokens
    high_entropy_share      fraction of counted tokens with H_t > 6.8 (figure 10, without a unit)

Entropy at the token has a floor of ln k where k synonyms are equally good, and falls as the
model settles on one; entropy after the token shows whether the turn itself is open.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Up to ln(vocabulary) = 11.93 nats for 151,674 tokens; fine where small models live, and with an
# edge at 6.8 so that the report's fraction can be read off the histogram.
# fmt: off
ENTROPY_BIN_EDGES: tuple[float, ...] = (
    0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5,
    1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.8, 7.5, 8.0, 9.0, 10.0, 11.0, 12.0,
)
# fmt: on
_SUMS = ("entropy", "critical_entropy", "entropy_after", "tokens", "critical", "followed", "high")


class CriticalTokenMonitor:
    """An accumulator of these statistics over micro-batches; only `result` waits for the device.

    Sums are kept in float64 on the device of the first update, so that the split of the batch into
    micro-batches changes only the last bits. What one rank measures another can add.

    Args:
        token_ids: the critical tokens, see `r1v3.data.words.expand_words`; may be empty.
        high_entropy_nats: threshold of `high_entropy_share`.
        bin_edges: increasing edges of `entropy_histogram` in nats; entropies below the first or
            above the last edge count in the outermost bins.
    Raises:
        ValueError: a negative token id, or edges that do not increase.
    """

    def __init__(
        self,
        token_ids: Iterable[int],
        *,
        high_entropy_nats: float = 6.8,
        bin_edges: Sequence[float] = ENTROPY_BIN_EDGES,
    ) -> None:
        self.token_ids = tuple(sorted(set(token_ids)))
        if self.token_ids and self.token_ids[0] < 0:
            raise ValueError(f"token_ids must be >= 0, got {self.token_ids[0]}")
        self.bin_edges = tuple(float(edge) for edge in bin_edges)
        increasing = all(a < b for a, b in zip(self.bin_edges, self.bin_edges[1:], strict=False))
        if len(self.bin_edges) < 2 or not increasing:
            raise ValueError(f"bin_edges must be at least two increasing numbers, got {bin_edges}")
        self.high_entropy_nats = high_entropy_nats
        self._ids = torch.tensor(self.token_ids, dtype=torch.long)
        self._inner_edges = torch.tensor(self.bin_edges[1:-1], dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        """Forget all updates."""
        self._total: Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers that `measure` returns."""
        return len(_SUMS) + len(self.bin_edges) - 1

    def update(self, response_ids: Tensor, entropy: Tensor, mask: Tensor) -> None:
        """Measure and add a micro-batch."""
        self.add(self.measure(response_ids, entropy, mask))

    def add(self, measured: Tensor) -> None:
        """Add what `measure` returned, here or on another rank."""
        if self._total is None:
            self._total = measured.clone()
        else:
            self._total += measured.to(self._total.device)

    @torch.no_grad()
    def measure(self, response_ids: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        """Return the sums of a micro-batch, float64 [width], which add up.

        Args:
            response_ids: [B, T] integer, the tokens that were emitted.
            entropy: [B, T] float, nats, of the distribution each of these was drawn from
                (for a causal model: that of the logits one position earlier).
            mask: [B, T], nonzero where a token counts; other values are never read.
        Raises:
            ValueError: shapes differ, or the ids are not integers.
        """
        if response_ids.dim() != 2 or not response_ids.shape == entropy.shape == mask.shape:
            raise ValueError(
                "response_ids, entropy and mask must have one shape [B, T], got "
                f"{list(response_ids.shape)}, {list(entropy.shape)} and {list(mask.shape)}"
            )
        if response_ids.is_floating_point():
            raise ValueError(f"response_ids must be integers, got {response_ids.dtype}")
        if response_ids.numel() == 0:
            return torch.zeros(self.width, dtype=torch.float64, device=entropy.device)
        device = entropy.device
        valid = mask.to(device) != 0
        entropy = torch.where(valid, entropy, 0).double()
        self._ids, self._inner_edges = self._ids.to(device), self._inner_edges.to(device)
        critical = valid & torch.isin(response_ids.to(device), self._ids)
        following = _next_valid(valid)
        has_next = critical & (following < valid.shape[1])
        after = entropy.gather(1, following.clamp(max=valid.shape[1] - 1))
        zero = entropy.new_zeros(())
        high = valid & (entropy > self.high_entropy_nats)
        sums = [
            entropy.sum(),
            torch.where(critical, entropy, zero).sum(),
            torch.where(has_next, after, zero).sum(),
            *(part.sum().double() for part in (valid, critical, has_next, high)),
        ]
        return torch.cat([torch.stack(sums), self._bin(entropy, valid).double()])

    def result(self) -> dict[str, Any]:
        """Return the statistics since the last reset; synchronizes with the device.

        Returns:
            critical_entropy, critical_entropy_after, entropy (float, nats), high_entropy_share
            (float in [0, 1]), critical_tokens (int), entropy_histogram (int counts per bin of
            `bin_edges`, without NaN). A mean or fraction over no tokens is None.
        """
        total = [0.0] * self.width if self._total is None else self._total.tolist()
        sums = dict(zip(_SUMS, total, strict=False))
        tokens, critical, followed, high = (int(sums[name]) for name in _SUMS[3:])
        return {
            "critical_entropy": sums["critical_entropy"] / critical if critical else None,
            "critical_entropy_after": sums["entropy_after"] / followed if followed else None,
            "critical_tokens": critical,
            "entropy": sums["entropy"] / tokens if tokens else None,
            "high_entropy_share": high / tokens if tokens else None,
            "entropy_histogram": [int(count) for count in total[len(_SUMS) :]],
        }

    def _bin(self, entropy: Tensor, valid: Tensor) -> Tensor:
        bins = torch.bucketize(entropy, self._inner_edges, right=True)
        counted = (valid & ~entropy.isnan()).long()
        histogram = counted.new_zeros(len(self.bin_edges) - 1)
        # Integer addition: the result does not depend on the order of the threads.
        return histogram.scatter_add_(0, bins.flatten(), counted.flatten())


def _next_valid(valid: Tensor) -> Tensor:
    """[B, T] bool -> [B, T] int64: the next valid position after each one, T where none is."""
    length = valid.shape[1]
    positions = torch.arange(length, device=valid.device).expand_as(valid)
    own = torch.where(valid, positions, length)
    at_or_after = own.flip(1).cummin(dim=1).values.flip(1)
    return torch.nn.functional.pad(at_or_after[:, 1:], (0, 1), value=length)
