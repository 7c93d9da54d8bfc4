"""Records that a long run could not use: left out, counted by reason, and reported at its end."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar


Result = TypeVar("Result")

# What code that reads a record raises when the record is not of the form it is documented to have.
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)


class Unusable(Exception):
    """A record cannot be used; the message is the reason, the same for all records with the same fault."""


class Rejects:
    """Counts what a run leaves out.

    Attributes:
        counts: reason -> number of records.
        examples: reason -> name of the first of these records.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    @property
    def total(self) -> int:
        """Number of records left out, whatever the reason."""
        return sum(self.counts.values())

    def add(self, reason: str, record: object) -> None:
        """Count one record, by its name or number."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, str(record))

    def attempt(self, record: object, make: Callable[..., Result], *arguments: Any) -> Result | None:
        """`make(*arguments)`; or None, and `record` counted, where it raises `Unusable` or trips over the record's form."""
        try:
            return make(*arguments)
        except Unusable as error:
            self.add(str(error), record)
        except KeyError as error:
            self.add(f"record lacks {error}", record)
        except MALFORMED as error:
            self.add(f"record is malformed ({type(error).__name__})", record)
        return None

    def __str__(self) -> str:
        """One sentence: how many, and why, the most frequent reason first."""
        reasons = (f"{reason}: {count} (first: {self.examples[reason]})" for reason, count in self.counts.most_common())
        return f"{self.total} left out; {'; '.join(reasons)}" if self.counts else "nothing left out"

    def warn(self, run: str) -> None:
        """Say what `run` left out, as one warning, if it did."""
        if self.counts:
            warnings.warn(f"{run}: {self}", stacklevel=2)


@contextmanager
def reported(rejects: Rejects | None, run: str) -> Iterator[Rejects]:
    """`rejects`, which its owner reports; or where it is None a new one, reported when the block has run to its end."""
    if rejects is not None:
        yield rejects
        return
    own = Rejects()
    yield own
    own.warn(run)
