"""A cache whose bound is memory: entries of one data set may be a thousand times as large as those of another."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import PIL.Image
import torch


MIB = 2**20

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Keeps the values that were used last, up to `max_bytes`. What is larger alone is made anew each time.

    Copies that are sent to other processes start empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: dict[Hashable, tuple[Value, int]] = {}

    def __reduce__(self):
        return ByteCache, (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of that key; where it is not there, what `make` returns."""
        entry = self._entries.pop(key, None)
        if entry is None:
            value = make()
            entry = value, size_of(key) + size_of(value)
        else:
            self.bytes -= entry[1]
        if entry[1] <= self.max_bytes:
            # At the end of the dictionary: the first is always that which was not used for longest.
            self._entries[key] = entry
            self.bytes += entry[1]
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.pop(next(iter(self._entries)))[1]
        return entry[0]


def size_of(value: Any) -> int:
    """Bytes of a value with all that it holds; what it holds twice counts twice."""
    if isinstance(value, np.ndarray):
        return value.nbytes + sys.getsizeof(np.empty(0))
    if isinstance(value, torch.Tensor):
        return value.nbytes + sys.getsizeof(value)
    if isinstance(value, PIL.Image.Image):
        return value.width * value.height * (4 if len(value.getbands()) > 1 else 1) + sys.getsizeof(value)
    held: Any = ()
    if isinstance(value, Mapping):
        held = (part for item in value.items() for part in item)
    elif isinstance(value, (tuple, list, set, frozenset)):
        held = value
    elif dataclasses.is_dataclass(value):
        held = (getattr(value, field.name) for field in dataclasses.fields(value))
    return sys.getsizeof(value) + sum(map(size_of, held))
