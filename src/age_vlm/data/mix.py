"""Several data sets as one: how often each comes up follows from its weight, not from its size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from ..errors import UserError
from .schema import Sample


class Mix(Dataset):
    """The first `length` samples of a mixture, map-style: an index always gives the same sample, for a given seed.

    Each part has its share of the samples, in random order. A part is passed through whole before any of its samples comes
    again.

    Args:
        parts: map-style data sets.
        weights: of each part, relative to one another.

    Raises:
        UserError: one sentence, for no parts, one without samples, a weight that is not positive, another number of
            weights, or a length below 1.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float], length: int, seed: int = 0):
        if not parts or len(parts) != len(weights):
            raise UserError(
                f"weights: got {len(weights)} for {len(parts)} parts, expected one for each of at least one."
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"weights: got {list(weights)}, expected positive numbers.")
        if not all(len(part) for part in parts):
            raise UserError("parts: got one without samples, expected at least one sample in each.")
        if length < 1:
            raise UserError(f"length: got {length}, expected at least 1.")
        self.parts, self.weights, self.length, self.seed = list(parts), list(weights), length, seed
        # The remainder of each share is left to the largest ones.
        shares = np.array(weights, float) / sum(weights) * length
        counts = shares.astype(int)
        counts[np.argsort(counts - shares, kind="stable")[: length - counts.sum()]] += 1
        self._part = np.random.default_rng([seed, 0]).permutation(np.repeat(np.arange(len(parts)), counts))
        self._number = np.empty(length, int)
        for k, (part, count) in enumerate(zip(parts, counts)):
            self._number[self._part == k] = _passes(len(part), count, [seed, 1, k])

    def __len__(self) -> int:
        return self.length

    def part(self, index: int) -> int:
        """Which part the sample of that index is from."""
        return int(self._part[index])

    def origin(self, index: int) -> tuple[int, int]:
        """Which part the sample of that index is from, and its index there."""
        return self.part(index), int(self._number[index])

    @property
    def different(self) -> int:
        """How many different samples it has, however often each comes up."""
        return len(np.unique(np.stack([self._part, self._number]), axis=1).T)

    def __getitem__(self, index: int) -> Sample:
        part, number = self.origin(index)
        return self.parts[part][number]


def _passes(size: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """`count` numbers below `size`: one shuffled pass after the other."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(size) for _ in range(max(1, -(-count // size)))])[:count]
