"""Records by their identifiers, which files write as numbers or as texts, leave out, and repeat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from ..rejects import Rejects, Unusable


Record = TypeVar("Record")


def identity(value: Any) -> str:
    """An identifier as text, the same for 12, 12.0, "12" and " 12 ".

    Raises:
        Unusable: it is missing, or neither a number nor a text.
    """
    if value is None or value == "":
        raise Unusable("identifier is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # Python takes True for 1.
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise Unusable("identifier is neither a whole number nor a text")
    return str(value).strip()


class Index(Generic[Record]):
    """Records by identifier. Of different records with one identifier nobody knows which is meant, so none of them is used.

    Args:
        what: what a record is, for the reasons.
        rejects: counts records that repeat, and those that share an identifier.
    """

    __slots__ = ("_ambiguous", "_records", "rejects", "what")

    def __init__(self, what: str, rejects: Rejects) -> None:
        self.what, self.rejects = what, rejects
        self._records: dict[str, Record] = {}
        self._ambiguous: set[str] = set()

    def add(self, identifier: Any, record: Record) -> bool:
        """Take a record in; whether its identifier is new.

        Raises:
            Unusable: the identifier is none.
        """
        key = identity(identifier)
        name = f"{self.what} {key}"
        if key in self._ambiguous:
            self.rejects.add(self._shared, name)
        elif key not in self._records:
            self._records[key] = record
            return True
        elif self._records[key] == record:
            self.rejects.add(f"{self.what} repeats", name)
        else:
            del self._records[key]
            self._ambiguous.add(key)
            for _ in range(2):
                self.rejects.add(self._shared, name)
        return False

    def get(self, identifier: Any) -> Record:
        """The record of that identifier.

        Raises:
            Unusable: there is none, or more than one.
        """
        key = identity(identifier)
        if key in self._ambiguous:
            raise Unusable(self._shared)
        if key not in self._records:
            raise Unusable(f"{self.what} is unknown")
        return self._records[key]

    def __contains__(self, identifier: Any) -> bool:
        """Whether there is any record of that identifier, be it the only one or not."""
        key = identity(identifier)
        return key in self._records or key in self._ambiguous

    @property
    def is_whole(self) -> bool:
        """Whether all records that came can be used: none shares its identifier with a different one."""
        return not self._ambiguous

    def items(self) -> Iterator[tuple[str, Record]]:
        """`identity` and record of all that can be used, in the order in which they came."""
        return iter(self._records.items())

    @property
    def _shared(self) -> str:
        return f"{self.what} identifier stands for different records"
