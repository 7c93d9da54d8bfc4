"""The most bytes that the tensors of a program hold at once, and what they are."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its release; fake tensors count as if they were real.

    `torch.distributed._tools.mem_tracker.MemTracker` does the same but refuses models with frozen parameters (torch 2.15).
    What a kernel allocates for itself is not seen.

    Args:
        shares: name -> kind -> share of such tensors that one device holds (1 for kinds that are not named). Each name has
            a peak of its own: with less of one kind, the most is needed at another moment.

    Attributes:
        peaks: name -> kind -> bytes, at the moment when their sum was largest.
    """

    def __init__(self, shares: Mapping[str, Mapping[str, float]]):
        super().__init__()
        self.shares = shares
        self.peaks: dict[str, dict[str, float]] = {name: {} for name in shares}
        self._kinds = ["other"]
        self._held: Counter[str] = Counter()
        self._entries = WeakIdKeyDictionary()
        self._highest = dict.fromkeys(shares, 0.0)

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, kind: str) -> None:
        self._kinds.append(kind)

    def leave(self) -> None:
        self._kinds.pop()

    def count_as(self, kind: str, *tensors: torch.Tensor) -> None:
        """Names what is held already, whoever made it."""
        for tensor in tensors:
            entry = self._entry(tensor)
            self._held[entry[0]] -= entry[1]
            entry[0] = kind
            self._held[kind] += entry[1]
        self._look()

    def _entry(self, tensor: torch.Tensor) -> list:
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage)
        if entry is None:
            entry = self._entries[storage] = [self._kinds[-1], storage.nbytes()]
            self._held[entry[0]] += entry[1]
            weakref.finalize(storage, self._release, entry).atexit = False
        return entry

    def _release(self, entry: list) -> None:
        self._held[entry[0]] -= entry[1]

    def _look(self) -> None:
        for name, shares in self.shares.items():
            total = sum(size * shares.get(kind, 1.0) for kind, size in self._held.items())
            if total > self._highest[name]:
                self._highest[name] = total
                self.peaks[name] = {kind: size * shares.get(kind, 1.0) for kind, size in self._held.items() if size}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._entry(value)
        self._look()
        return result
